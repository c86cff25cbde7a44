/**
 * Initial RAM file systems, written as the kernel reads them: a cpio archive in the "newc" form
 * (Documentation/driver-api/early-userspace/buffer-format.rst), optionally in gzip.
 *
 * @module
 */
import { createWriteStream } from 'node:fs'
import { lstat, open, opendir, readlink } from 'node:fs/promises'
import { posix, resolve } from 'node:path'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { createGzip } from 'node:zlib'
import { ImageError } from '../errors.js'
import type { Abortable } from '../signal.js'

/**
 * One thing in an initramfs. Paths start at the guest's root, with or without a slash; folders above are made as they are
 * needed. Everything belongs to root.
 */
export type InitramfsEntry =
  /** A file of given content. */
  | { path: string; type: 'file'; data: string | Uint8Array; mode?: number | undefined }
  /** A copy of a file of the host; a symbolic link is followed. */
  | { path: string; type: 'file'; source: string; mode?: number | undefined }
  /** A folder. */
  | { path: string; type: 'directory'; mode?: number | undefined }
  /** A symbolic link. */
  | { path: string; type: 'symlink'; target: string }
  /** A device node. */
  | { path: string; type: 'char' | 'block'; major: number; minor: number; mode?: number | undefined }
  /** All that is in a folder of the host, with modes, links as links; sockets, pipes and devices are left out. */
  | { path: string; type: 'tree'; source: string; filter?: ((path: string) => boolean) | undefined }

/** How an initramfs is built. */
export interface InitramfsOptions extends Abortable {
  /** Whether to compress with gzip. Default `false`: the kernel takes longer to unpack than to copy. */
  compress?: boolean | undefined
}

const S_IFDIR = 0o040000
const S_IFREG = 0o100000
const S_IFLNK = 0o120000
const S_IFCHR = 0o020000
const S_IFBLK = 0o060000
const maxFile = 0xffff_ffff
const zeros = Buffer.alloc(4)

/**
 * An initramfs as a stream of bytes. Files are read as the stream is, so that archives larger than memory can be written.
 * The same entries give the same bytes. Of two entries with one path the later counts, as in the kernel.
 *
 * @example
 * ```ts
 * await pipeline(buildInitramfs([
 *   { path: 'init', type: 'file', data: '#!/bin/sh\n...', mode: 0o755 },
 *   { path: '/', type: 'tree', source: '/srv/guest-root' },
 * ], { compress: true }), createWriteStream('initrd'))
 * ```
 *
 * The stream fails with an ImageError `ERR_INITRAMFS` that names the entry.
 */
export function buildInitramfs(
  entries: Iterable<InitramfsEntry> | AsyncIterable<InitramfsEntry>,
  options: InitramfsOptions = {},
): Readable {
  const archive = Readable.from(new Archive().write(entries, options.signal), { objectMode: false })
  if (options.signal) {
    const { signal } = options
    const onAbort = (): void => {
      archive.destroy(signal.reason instanceof Error ? signal.reason : new Error(String(signal.reason)))
    }
    if (signal.aborted) onAbort()
    else signal.addEventListener('abort', onAbort, { once: true })
    archive.once('close', () => signal.removeEventListener('abort', onAbort))
  }
  if (!options.compress) return archive
  const gzip = createGzip({ level: 6 })
  archive.once('error', (error) => gzip.destroy(error))
  gzip.once('close', () => archive.destroy())
  return archive.pipe(gzip)
}

/** Writes an initramfs to a file, and leaves nothing behind if that fails part-way but the part. */
export async function writeInitramfs(
  file: string,
  entries: Iterable<InitramfsEntry> | AsyncIterable<InitramfsEntry>,
  options: InitramfsOptions = {},
): Promise<void> {
  await pipeline(buildInitramfs(entries, options), createWriteStream(file))
}

/** One archive while it is written. */
class Archive {
  #inode = 0
  readonly #folders = new Set<string>([''])

  async *write(
    entries: Iterable<InitramfsEntry> | AsyncIterable<InitramfsEntry>,
    signal: AbortSignal | undefined,
  ): AsyncGenerator<Buffer, void, undefined> {
    for await (const entry of entries) {
      signal?.throwIfAborted()
      yield* this.#entry(entry)
    }
    yield this.#header('TRAILER!!!', 0, 0)
  }

  async *#entry(entry: InitramfsEntry): AsyncGenerator<Buffer, void, undefined> {
    const name = normalize(entry.path)
    if (entry.type === 'tree') {
      yield* this.#tree(name, entry.source, entry.filter)
      return
    }
    if (name === '') {
      if (entry.type === 'directory') return
      throw bad(entry.path, 'the root of the file system is a directory')
    }
    yield* this.#parents(name)
    switch (entry.type) {
      case 'directory':
        // A folder that is there already only changes its mode.
        this.#folders.add(name)
        yield this.#header(name, S_IFDIR | mode(entry.path, entry.mode, 0o755), 0)
        return
      case 'symlink':
        yield* this.#small(name, S_IFLNK | 0o777, Buffer.from(entry.target))
        return
      case 'char':
      case 'block': {
        const type = entry.type === 'char' ? S_IFCHR : S_IFBLK
        for (const number of [entry.major, entry.minor]) {
          if (!Number.isInteger(number) || number < 0 || number > 0xfffff) {
            throw bad(entry.path, `${number} is not a device number`)
          }
        }
        yield this.#header(name, type | mode(entry.path, entry.mode, 0o600), 0, entry.major, entry.minor)
        return
      }
      case 'file':
        if ('source' in entry) {
          yield* this.#copy(name, entry.source, entry.mode)
        } else {
          const data = typeof entry.data === 'string' ? Buffer.from(entry.data) : entry.data
          yield* this.#small(name, S_IFREG | mode(entry.path, entry.mode, 0o644), data)
        }
        return
      default:
        throw bad(
          (entry as { path: string }).path,
          `there is no type ${JSON.stringify((entry as { type: unknown }).type)}`,
        )
    }
  }

  *#parents(name: string): Generator<Buffer, void, undefined> {
    const parts = name.split('/').slice(0, -1)
    for (let depth = 1; depth <= parts.length; depth++) {
      const folder = parts.slice(0, depth).join('/')
      if (this.#folders.has(folder)) continue
      this.#folders.add(folder)
      yield this.#header(folder, S_IFDIR | 0o755, 0)
    }
  }

  async *#tree(
    name: string,
    source: string,
    filter: ((path: string) => boolean) | undefined,
  ): AsyncGenerator<Buffer, void, undefined> {
    const pending = [{ name, source: resolve(source) }]
    for (let next = pending.pop(); next; next = pending.pop()) {
      const names: string[] = []
      try {
        for await (const child of await opendir(next.source)) names.push(child.name)
      } catch (cause) {
        throw bad(next.name || '/', `cannot read the folder ${next.source}: ${reason(cause)}`, cause)
      }
      // The order of a folder is the file system's whim; archives should not depend on it.
      names.sort()
      for (const child of names) {
        const inside = next.name === '' ? child : `${next.name}/${child}`
        if (filter && !filter(inside)) continue
        const outside = `${next.source}/${child}`
        const stat = await attempt(inside, () => lstat(outside))
        if (stat.isDirectory()) {
          yield* this.#entry({ path: inside, type: 'directory', mode: stat.mode & 0o7777 })
          pending.push({ name: inside, source: outside })
        } else if (stat.isSymbolicLink()) {
          yield* this.#entry({ path: inside, type: 'symlink', target: await attempt(inside, () => readlink(outside)) })
        } else if (stat.isFile()) {
          yield* this.#entry({ path: inside, type: 'file', source: outside, mode: stat.mode & 0o7777 })
        }
      }
    }
  }

  *#small(name: string, fileMode: number, data: Uint8Array): Generator<Buffer, void, undefined> {
    yield this.#header(name, fileMode, data.length)
    if (data.length > 0) yield Buffer.from(data.buffer, data.byteOffset, data.byteLength)
    yield* padding(data.length)
  }

  async *#copy(name: string, source: string, wanted: number | undefined): AsyncGenerator<Buffer, void, undefined> {
    const file = await attempt(name, () => open(source))
    try {
      const stat = await attempt(name, () => file.stat())
      if (!stat.isFile()) throw bad(name, `${source} is not a file`)
      if (stat.size > maxFile) throw bad(name, `${source} has ${stat.size} bytes, an initramfs holds files under 4 GiB`)
      yield this.#header(name, S_IFREG | mode(name, wanted, stat.mode & 0o7777), stat.size)
      let length = 0
      for await (const chunk of file.createReadStream({ autoClose: false }) as AsyncIterable<Buffer>) {
        length += chunk.length
        if (length > stat.size) break
        yield chunk
      }
      if (length !== stat.size) throw bad(name, `${source} changed while it was read`)
      yield* padding(stat.size)
    } finally {
      await file.close()
    }
  }

  /** The header of an entry with its name, padded to four bytes. */
  #header(name: string, fileMode: number, size: number, major = 0, minor = 0): Buffer {
    const bytes = Buffer.from(name)
    const links = (fileMode & 0o170000) === S_IFDIR ? 2 : 1
    const inode = name === 'TRAILER!!!' ? 0 : ++this.#inode
    // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    const fields = [inode, fileMode, 0, 0, links, 0, size, 0, 0, major, minor, bytes.length + 1, 0]
    const head = `070701${fields.map((field) => field.toString(16).toUpperCase().padStart(8, '0')).join('')}`
    const end = Buffer.alloc(pad(head.length + bytes.length + 1) + 1)
    return Buffer.concat([Buffer.from(head), bytes, end])
  }
}

function* padding(size: number): Generator<Buffer, void, undefined> {
  if (pad(size) > 0) yield zeros.subarray(0, pad(size))
}

function pad(length: number): number {
  return -length & 3
}

function normalize(path: string): string {
  if (typeof path !== 'string' || path === '') throw bad(String(path), 'an entry needs a path')
  if (path.includes('\0')) throw bad(JSON.stringify(path), 'a path holds no NUL')
  const name = posix.normalize(`/${path}`).replace(/^\/+|\/+$/g, '')
  if (path.split('/').includes('..')) throw bad(path, 'a path does not go up')
  if (Buffer.byteLength(name) > 4095) throw bad(`${name.slice(0, 60)}…`, 'a path has at most 4095 bytes')
  return name
}

function mode(path: string, wanted: number | undefined, fallback: number): number {
  if (wanted === undefined) return fallback
  if (!Number.isInteger(wanted) || wanted < 0 || wanted > 0o7777) throw bad(path, `${wanted} is not a mode`)
  return wanted
}

async function attempt<T>(path: string, action: () => Promise<T>): Promise<T> {
  try {
    return await action()
  } catch (cause) {
    throw bad(path, reason(cause), cause)
  }
}

function reason(cause: unknown): string {
  return cause instanceof Error ? cause.message : String(cause)
}

function bad(path: string, message: string, cause?: unknown): ImageError {
  return new ImageError('ERR_INITRAMFS', `initramfs entry ${path}: ${message}`, { cause, details: { entry: path } })
}

import { execFile } from 'node:child_process'
import { chmod, mkdir, mkdtemp, open, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { promisify } from 'node:util'
import { gunzipSync } from 'node:zlib'
import fc from 'fast-check'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { buildInitramfs, type InitramfsEntry, writeInitramfs } from '../../ts/src/images/initramfs.js'

interface Member {
  name: string
  mode: number
  data: Buffer
  rdev: [number, number]
  links: number
}

/** Reads a newc archive as the kernel does (init/initramfs.c): fields of eight hexadecimal digits, everything on fours. */
function parse(archive: Buffer): Member[] {
  const members: Member[] = []
  const inodes = new Set<number>()
  for (let at = 0; ; ) {
    expect(archive.toString('latin1', at, at + 6)).toBe('070701')
    const fields = Array.from({ length: 13 }, (_, n) =>
      Number.parseInt(archive.toString('latin1', at + 6 + n * 8, at + 14 + n * 8), 16),
    )
    const [inode = 0, mode = 0, uid, gid, links = 0, mtime, size = 0, , , major = 0, minor = 0, nameSize = 0, check] =
      fields
    expect([uid, gid, mtime, check]).toEqual([0, 0, 0, 0])
    const name = archive.toString('utf8', at + 110, at + 110 + nameSize - 1)
    expect(archive[at + 110 + nameSize - 1]).toBe(0)
    const start = (at + 110 + nameSize + 3) & ~3
    const data = archive.subarray(start, start + size)
    at = (start + size + 3) & ~3
    if (name === 'TRAILER!!!') {
      expect(at).toBe(archive.length)
      return members
    }
    expect(inodes.has(inode)).toBe(false)
    inodes.add(inode)
    members.push({ name, mode, data, rdev: [major, minor], links })
  }
}

const build = async (entries: InitramfsEntry[]) => parse(await buffer(buildInitramfs(entries)))

let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'skep-initramfs-'))
})
afterAll(async () => {
  await rm(folder, { recursive: true })
})

describe('an initramfs', () => {
  test('holds every kind of entry, and the folders above', async () => {
    const members = await build([
      { path: 'init', type: 'file', data: '#!/bin/sh\n', mode: 0o755 },
      { path: '/usr/share/doc/note', type: 'file', data: Buffer.from([1, 2, 3]) },
      { path: 'usr', type: 'directory', mode: 0o700 },
      { path: 'bin', type: 'symlink', target: 'usr/bin' },
      { path: 'dev/console', type: 'char', major: 5, minor: 1 },
      { path: 'dev/vda', type: 'block', major: 254, minor: 0, mode: 0o660 },
      { path: 'empty', type: 'file', data: '' },
    ])
    expect(members.map(({ name, mode, rdev }) => [name, mode.toString(8), ...rdev])).toEqual([
      ['init', '100755', 0, 0],
      ['usr', '40755', 0, 0],
      ['usr/share', '40755', 0, 0],
      ['usr/share/doc', '40755', 0, 0],
      ['usr/share/doc/note', '100644', 0, 0],
      ['usr', '40700', 0, 0],
      ['bin', '120777', 0, 0],
      ['dev', '40755', 0, 0],
      ['dev/console', '20600', 5, 1],
      ['dev/vda', '60660', 254, 0],
      ['empty', '100644', 0, 0],
    ])
    expect(members[0]?.data.toString()).toBe('#!/bin/sh\n')
    expect(members[6]?.data.toString()).toBe('usr/bin')
  })

  test('holds trees of the host, in the same order each time', async () => {
    const root = join(folder, 'tree')
    await mkdir(join(root, 'b/c'), { recursive: true })
    await writeFile(join(root, 'b/c/file'), 'data')
    await chmod(join(root, 'b/c/file'), 0o750)
    await symlink('/nowhere', join(root, 'a'))
    await writeFile(join(root, 'left-out'), 'x')
    const entries: InitramfsEntry[] = [
      { path: '/opt', type: 'tree', source: root, filter: (path) => path !== 'opt/left-out' },
    ]
    const members = await build(entries)
    expect(members.map(({ name, data }) => [name, data.toString()])).toEqual([
      ['opt', ''],
      ['opt/a', '/nowhere'],
      ['opt/b', ''],
      ['opt/b/c', ''],
      ['opt/b/c/file', 'data'],
    ])
    expect(members[4]?.mode.toString(8)).toBe('100750')
    expect(await buffer(buildInitramfs(entries))).toEqual(await buffer(buildInitramfs(entries)))
  })

  test('is read back by cpio', async () => {
    const file = join(folder, 'archive')
    await writeInitramfs(file, [
      { path: 'a/b', type: 'file', data: 'hello' },
      { path: 'l', type: 'symlink', target: 'a/b' },
    ])
    const { stdout } = await promisify(execFile)('sh', ['-c', '(cpio -t || busybox cpio -t) < "$0" 2>/dev/null', file])
    expect(stdout).toBe('a\na/b\nl\n')
  })

  test('is the same in gzip', async () => {
    const entries: InitramfsEntry[] = [{ path: 'zeros', type: 'file', data: Buffer.alloc(1 << 20) }]
    const [plain, packed] = await Promise.all([
      buffer(buildInitramfs(entries)),
      buffer(buildInitramfs(entries, { compress: true })),
    ])
    expect(packed.length).toBeLessThan(10_000)
    expect(gunzipSync(packed).equals(plain)).toBe(true)
  })

  test('is as large as it is, not as memory is: files are read as it is written', async () => {
    const source = join(folder, 'large')
    const handle = await open(source, 'w')
    await handle.truncate(200 << 20)
    await handle.close()
    let length = 0
    let most = 0
    for await (const chunk of buildInitramfs([{ path: 'large', type: 'file', source }])) {
      length += chunk.length
      most = Math.max(most, chunk.length)
    }
    expect(length).toBeGreaterThan(200 << 20)
    expect(most).toBeLessThanOrEqual(1 << 20)
  })

  test('takes entries that come one after another', async () => {
    async function* entries(): AsyncGenerator<InitramfsEntry> {
      yield { path: 'a', type: 'directory' }
      yield { path: 'b', type: 'directory' }
    }
    expect(parse(await buffer(buildInitramfs(entries()))).map(({ name }) => name)).toEqual(['a', 'b'])
  })

  test.each<[InitramfsEntry, RegExp]>([
    [{ path: '', type: 'directory' }, /needs a path/],
    [{ path: '../x', type: 'directory' }, /does not go up/],
    [{ path: 'a/../../x', type: 'directory' }, /does not go up/],
    [{ path: 'a\0b', type: 'directory' }, /no NUL/],
    [{ path: '/', type: 'symlink', target: 'x' }, /the root/],
    [{ path: 'x'.repeat(5000), type: 'directory' }, /4095 bytes/],
    [{ path: 'x', type: 'file', data: '', mode: 0o10000 }, /not a mode/],
    [{ path: 'x', type: 'char', major: -1, minor: 0 }, /device number/],
    [{ path: 'x', type: 'file', source: '/does/not/exist' }, /ENOENT/],
    [{ path: 'x', type: 'file', source: '/' }, /not a file|EISDIR/],
    [{ path: 'x', type: 'file', source: '/dev/null' }, /not a file/],
    [{ path: 'x', type: 'tree', source: '/does/not/exist' }, /cannot read the folder/],
    [{ path: 'x', type: 'socket' } as never, /no type "socket"/],
  ])('refuses %#', async (entry, message) => {
    await expect(buffer(buildInitramfs([entry]))).rejects.toMatchObject({ code: 'ERR_INITRAMFS', message })
    await expect(buffer(buildInitramfs([entry], { compress: true }))).rejects.toMatchObject({ code: 'ERR_INITRAMFS' })
  })

  test('is broken off by its signal', async () => {
    const controller = new AbortController()
    const archive = buildInitramfs([{ path: 'x', type: 'file', source: join(folder, 'large') }], {
      signal: controller.signal,
    })
    archive.once('data', () => controller.abort(new Error('enough')))
    await expect(buffer(archive)).rejects.toThrow('enough')
    await expect(buffer(buildInitramfs([], { signal: AbortSignal.abort(new Error('before')) }))).rejects.toThrow(
      'before',
    )
  })

  test('holds any names and any data', async () => {
    const name = fc
      .stringMatching(/^[^\0/]{1,40}$/u)
      .filter((text) => text !== '.' && text !== '..' && !/\p{Surrogate}/u.test(text))
    await fc.assert(
      fc.asyncProperty(fc.uniqueArray(fc.tuple(name, fc.uint8Array()), { selector: ([one]) => one }), async (files) => {
        const members = await build(files.map(([path, data]) => ({ path, type: 'file', data })))
        expect(members.map(({ name, data }) => [name, [...data]])).toEqual(
          files.map(([path, data]) => [path, [...data]]),
        )
      }),
    )
  })

  test('is written whole or fails', async () => {
    const file = join(folder, 'out')
    await writeInitramfs(file, [{ path: 'a', type: 'directory' }], { compress: true })
    expect(parse(gunzipSync(await readFile(file)))).toHaveLength(1)
    await expect(writeInitramfs(join(folder, 'no/such/folder'), [])).rejects.toMatchObject({ code: 'ENOENT' })
  })
})

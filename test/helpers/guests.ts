/**
 * Guests for the tests: the default image, Debian packages by name, initramfs archives of one's own, and the project's test
 * kernels. What is fetched or built is kept in the cache and made once.
 *
 * @module
 */
import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { createReadStream, createWriteStream, existsSync } from 'node:fs'
import { copyFile, mkdir, mkdtemp, readdir, readFile, rename, rm, stat, symlink } from 'node:fs/promises'
import { homedir } from 'node:os'
import { dirname, join, relative } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { Apt, fetchDebianPackages } from '../../dist/images/apt.js'
import { type InitramfsEntry, prepareImage, writeInitramfs } from '../../dist/index.js'

const run = promisify(execFile)

/** Something to boot, and what it says when it is up. */
export interface Guest {
  kernel: string
  initrd: string
  cmdline: string
  prompt: string
}

const cache = join(process.env['XDG_CACHE_HOME'] || join(homedir(), '.cache'), 'skep', 'tests')

/** Makes `path` in the cache by `make`, which gets a folder that becomes it; another process may do the same meanwhile. */
async function once(path: string, make: (folder: string) => Promise<void>): Promise<string> {
  const target = join(cache, path)
  if (existsSync(target)) return target
  await mkdir(dirname(target), { recursive: true })
  const folder = await mkdtemp(`${target}.part-`)
  try {
    await make(folder)
    await rename(folder, target).catch(async (error: NodeJS.ErrnoException) => {
      // Whoever was first has made the same.
      if (error.code !== 'ENOTEMPTY' && error.code !== 'EEXIST') throw error
    })
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
  return target
}

/** All files under `folder`, relative to it. */
async function files(folder: string): Promise<string[]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true })
  return entries.filter((entry) => entry.isFile()).map((entry) => relative(folder, join(entry.parentPath, entry.name)))
}

/** The one file in `folder` whose path matches. */
async function find(folder: string, pattern: RegExp): Promise<string> {
  const found = (await files(folder)).find((path) => pattern.test(path))
  if (found === undefined) throw new Error(`no file in ${folder} matches ${pattern}`)
  return join(folder, found)
}

/** Packages, unpacked side by side. */
function packages(names: readonly string[], dependencies = false): Promise<string> {
  const name = `${names.join('+')}${dependencies ? '+dependencies' : ''}`
  return once(join('packages', name), async (into) => {
    await fetchDebianPackages(names, { into, dependencies })
  })
}

/** A file of a Debian package. */
export async function packageFile(name: string, pattern: RegExp): Promise<string> {
  return await find(await packages([name]), pattern)
}

let cloud: Promise<Guest> | undefined

/** The default image: Debian's cloud kernel and a shell. */
export function debianCloud(): Promise<Guest> {
  cloud ??= prepareImage('debian-cloud')
  return cloud
}

/** Debian's full kernel and its modules, of the version that the metapackage names. */
export async function debianFull(): Promise<{ kernel: string; folder: string }> {
  const folder = await once('packages/linux-image-amd64', async (into) => {
    const apt = await Apt.open()
    const meta = await apt.show('linux-image-amd64')
    const name = meta?.depends.find((depend) => /^linux-image-\d/.test(depend))
    if (!name) throw new Error('the package sources have no linux-image-amd64')
    await fetchDebianPackages([name], { into })
  })
  return { kernel: await find(folder, /^boot\/vmlinuz-/), folder }
}

/** A script in `language` that computes things with known results. */
const SCRIPTS = {
  python3: `
import hashlib, json, os, random
def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
numbers = list(range(5000)); random.Random(1).shuffle(numbers)
print('RESULT', json.dumps({
  'language': 'python3', 'digest': hashlib.sha256(b'x' * 1000000).hexdigest(), 'fibonacci': fibonacci(20),
  'sorted': sorted(numbers) == list(range(5000)), 'files': sum(len(files) for _, _, files in os.walk('/')) }))
`,
  node: `
const { createHash } = require('node:crypto')
const fibonacci = (n) => (n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2))
const numbers = Array.from({ length: 5000 }, (_, i) => (i * 1237) % 5000).sort((a, b) => a - b)
console.log('RESULT', JSON.stringify({
  language: 'node', digest: createHash('sha256').update('x'.repeat(1000000)).digest('hex'), fibonacci: fibonacci(20),
  sorted: numbers.every((n, i) => n === i), version: process.version }))
`,
}

const INIT = (interpreter: string) => `#!/bin/busybox sh
export PATH=/usr/bin:/bin
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
${interpreter} /script
echo "the script ended with status $?"
/bin/busybox poweroff -f
`

/** This process's own Node and the libraries it needs. */
export async function hostNode(): Promise<InitramfsEntry[]> {
  const { stdout } = await run('ldd', [process.execPath])
  const libraries = [...stdout.matchAll(/(?:=> |^\s+)(\/\S+)/gm)].map(([, path = '']) => path)
  return [
    { path: '/usr/bin/node', type: 'file', source: process.execPath, mode: 0o755 },
    ...libraries.map((path): InitramfsEntry => ({ path, type: 'file', source: path, mode: 0o755 })),
  ]
}

/** Debian's Python and all it needs. */
async function debianPython(): Promise<InitramfsEntry[]> {
  const source = await packages(['python3'], true)
  // Where /lib and /lib64 have moved to /usr, the links are of another package than the files.
  for (const name of ['lib', 'lib64']) {
    if (existsSync(join(source, 'usr', name)) && !existsSync(join(source, name)))
      await symlink(`usr/${name}`, join(source, name))
  }
  return [{ path: '/', type: 'tree', source }]
}

/** An initramfs of a user's own: an interpreter, a script, and all modules of Debian's full kernel. */
export async function largeInitramfs(language: keyof typeof SCRIPTS): Promise<{ initrd: string; size: number }> {
  const folder = await once(`initramfs-${language}`, async (into) => {
    const busybox = await packageFile('busybox-static', /bin\/busybox$/)
    const { folder: modules } = await debianFull()
    const interpreter = language === 'node' ? await hostNode() : await debianPython()
    await writeInitramfs(join(into, 'initrd'), [
      ...interpreter,
      // Not under /lib, which may be a link.
      { path: '/modules', type: 'tree', source: modules, filter: (path) => !path.includes('vmlinuz-') },
      ...['proc', 'sys', 'dev', 'tmp'].map((path): InitramfsEntry => ({ path, type: 'directory' })),
      { path: '/dev/console', type: 'char', major: 5, minor: 1 },
      { path: '/bin/busybox', type: 'file', source: busybox, mode: 0o755 },
      { path: '/script', type: 'file', data: SCRIPTS[language] },
      { path: '/init', type: 'file', data: INIT(`/usr/bin/${language}`), mode: 0o755 },
    ])
  })
  const initrd = join(folder, 'initrd')
  return { initrd, size: (await stat(initrd)).size }
}

/** Guests with a Debian userland of one's own: the default image, and what `contents` says over it. */
export interface Userland {
  /** Packages, with all that they depend on. */
  packages?: readonly string[]
  /** Other files. */
  entries?: readonly InitramfsEntry[]
}

/** The default image with more in it; made once for each content. */
export async function debianWith(name: string, { packages: names = [], entries = [] }: Userland): Promise<Guest> {
  const image = await debianCloud()
  const hash = createHash('sha256').update(JSON.stringify([dirname(image.initrd), names]))
  for (const entry of entries) {
    const { mtimeMs } = 'source' in entry ? await stat(entry.source) : { mtimeMs: 0 }
    hash.update(JSON.stringify([entry, mtimeMs]))
  }
  const folder = await once(`with-${name}-${hash.digest('hex').slice(0, 12)}`, async (into) => {
    const [initrd, more] = [join(into, 'initrd'), join(into, 'more')]
    const trees: InitramfsEntry[] = []
    if (names.length > 0) trees.push({ path: '/', type: 'tree', source: await packages(names, true), filter: isNeeded })
    await writeInitramfs(more, [...trees, ...entries])
    // The kernel takes archives one behind the other, each at a multiple of 4.
    await copyFile(image.initrd, initrd)
    const start = Math.ceil((await stat(initrd)).size / 4) * 4
    await pipeline(createReadStream(more), createWriteStream(initrd, { flags: 'r+', start }))
    await rm(more)
  })
  return { ...image, initrd: join(folder, 'initrd') }
}

/** What nobody reads in a guest, and the graphics that stress-ng would like to have. */
function isNeeded(path: string): boolean {
  return !/(^|\/)(usr\/share\/(doc|man|locale|info|lintian|bug)|usr\/lib\/x86_64-linux-gnu\/(dri|libLLVM[^/]*|libgallium[^/]*))(\/|$)/.test(
    path,
  )
}

/** A program of `test/programs`, compiled to need no library. */
export function testProgram(name: string): Promise<string> {
  return compile(name, name, ['-lm'])
}

/** A program of `test/programs` that needs no library to be compiled either, for processors of so many bits. */
export function freestandingProgram(name: string, bits: 32 | 64): Promise<string> {
  const options = [`-m${bits}`, '-ffreestanding', '-nostdlib', '-fno-pic', '-no-pie', '-fno-stack-protector']
  return compile(name, `${name}-${bits}`, options)
}

async function compile(name: string, as: string, options: readonly string[]): Promise<string> {
  const source = fileURLToPath(new URL(`../programs/${name}.c`, import.meta.url))
  const folder = fileURLToPath(new URL('../../node_modules/.cache/skep/programs', import.meta.url))
  await mkdir(folder, { recursive: true })
  const program = join(folder, as)
  await run('cc', ['-O2', '-static', '-o', program, source, ...options])
  return program
}

let kernels: Promise<string> | undefined

/** The test kernels of `test/guests`, assembled; the path of one of them. */
export async function testKernel(name: string): Promise<string> {
  kernels ??= buildKernels()
  return join(await kernels, name)
}

async function buildKernels(): Promise<string> {
  const sources = fileURLToPath(new URL('../guests', import.meta.url))
  const out = fileURLToPath(new URL('../../node_modules/.cache/skep/guests', import.meta.url))
  await mkdir(out, { recursive: true })
  await run('sh', [join(sources, 'build.sh'), out])
  return out
}

/** What a file holds, as text; empty while it is not there. */
export const contents = (path: string): Promise<string> => readFile(path, 'utf8').catch(() => '')

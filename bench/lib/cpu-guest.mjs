// The guest of bench/cpu.mjs: an initramfs with the kernels and, if they are wanted, whole programs out of Debian's packages; and
// the same files as a folder, for the native runs. Made once and kept in the cache.
import { createHash } from 'node:crypto'
import {
  closeSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { basename, dirname, join } from 'node:path'
import { step } from '../../scripts/lib/progress.mjs'
import { Failure, output, run } from '../../scripts/lib/run.mjs'
import { PACKAGES, SOURCES } from './cpu-programs.mjs'

const MIB = 1 << 20
const LIBRARIES = ['lib/x86_64-linux-gnu', 'usr/lib/x86_64-linux-gnu']
const LOADER = 'lib64/ld-linux-x86-64.so.2'
const FOLDERS = ['proc', 'sys', 'dev', 'tmp']
const WEEK = 7 * 24 * 3600 * 1000

const hashOf = (...parts) => createHash('sha256').update(JSON.stringify(parts)).digest('hex').slice(0, 12)
const sources = (folder) =>
  readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name))
    .sort()
    .map((path) => [path.slice(folder.length), readFileSync(path, 'utf8')])

/** Makes `target` by `make`, which gets a folder that becomes it, unless it is there. */
async function once(target, title, make) {
  if (existsSync(target)) return target
  mkdirSync(dirname(target), { recursive: true })
  const folder = mkdtempSync(`${target}.part-`)
  try {
    await step(title, (step) => make(folder, step))
    renameSync(folder, target)
  } catch (error) {
    // Whoever was first has made the same.
    if (!['ENOTEMPTY', 'EEXIST'].includes(error.code)) throw told(error)
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
  return target
}

/** What the package says of a failure is meant for people. */
const told = (error) => (`${error.code}`.startsWith('ERR_IMAGE') ? new Failure(error.message) : error)

/**
 * The guest's files, made now if they are not there.
 * @param {{ programs: boolean }} options whether whole programs are wanted
 * @returns {Promise<{ initrd: string, tree: string, packages: Record<string, string> }>} `tree` is the folder for native runs
 */
export async function prepareCpuGuest({ programs }) {
  const { cacheFolder } = await import('../../dist/images/cache.js')
  const cache = join(cacheFolder(), 'bench')
  const names = programs ? PACKAGES : ['busybox-static']
  const packages = await once(
    join(cache, `packages-${hashOf(names)}`),
    "fetch the programs from Debian's packages",
    (folder, step) => fetchPackages(names, folder, step),
  )
  const versions = JSON.parse(readFileSync(join(packages, 'versions.json'), 'utf8'))
  const compiler = await output('gcc', ['--version'])
  if (!compiler) throw new Failure('gcc is missing: sudo apt install build-essential')
  const recipe = readFileSync(new URL(import.meta.url), 'utf8')
  const hash = hashOf(recipe, sources(SOURCES), versions, compiler)
  const folder = await once(join(cache, `cpu-${hash}`), 'pack the initramfs', async (folder) => {
    sweep(cache)
    const tree = join(folder, 'tree')
    await plantKernels(packages, tree)
    if (programs) await plantPrograms(packages, tree)
    await pack(tree, join(folder, 'initrd'))
  })
  return { initrd: join(folder, 'initrd'), tree: join(folder, 'tree'), packages: versions }
}

/** What earlier versions of the sources have left. */
function sweep(cache) {
  for (const name of readdirSync(cache).filter((name) => name.startsWith('cpu-'))) {
    const path = join(cache, name)
    if (Date.now() - statSync(path).mtimeMs > WEEK) rmSync(path, { recursive: true, force: true })
  }
}

async function fetchPackages(names, folder, step) {
  const { fetchDebianPackages } = await import('../../dist/images/apt.js')
  const onProgress = ({ message }) => step.note(message)
  const fetched = await fetchDebianPackages(names, { into: folder, dependencies: true, onProgress })
  const versions = Object.fromEntries(fetched.map(({ name, version }) => [name, version]))
  writeFileSync(join(folder, 'versions.json'), JSON.stringify(versions))
}

/** The one file among packages that matches. */
function find(packages, pattern) {
  const found = readdirSync(packages, { recursive: true }).find((path) => pattern.test(path))
  if (!found) throw new Failure(`the packages hold nothing like ${pattern}; please report it`)
  return join(packages, found)
}

/** A copy under another name; links are followed. */
function plant(source, tree, path) {
  const target = join(tree, path)
  mkdirSync(dirname(target), { recursive: true })
  cpSync(realpathSync(source), target, { recursive: true })
}

async function plantKernels(packages, tree) {
  for (const folder of FOLDERS) mkdirSync(join(tree, folder), { recursive: true })
  plant(find(packages, /(^|\/)bin\/busybox$/), tree, 'bin/busybox')
  plant(join(SOURCES, 'init.sh'), tree, 'init')
  mkdirSync(join(tree, 'bench'))
  const flags = ['-O2', '-static', '-Wall', '-Wextra']
  await run('gcc', [...flags, '-o', join(tree, 'bench/guest'), join(SOURCES, 'guest.c'), '-lm'], { log: 'bench-guest' })
}

async function plantPrograms(packages, tree) {
  const cc1 = find(packages, /\/cc1$/)
  const python = basename(find(packages, /^usr\/bin\/python3\.\d+$/))
  const programs = {
    'bench/cc1': cc1,
    [`usr/bin/${python}`]: join(packages, 'usr/bin', python),
    'usr/bin/node': find(packages, /^usr\/bin\/node$/),
    'usr/bin/lua5.4': find(packages, /^usr\/bin\/lua5\.4$/),
    'usr/bin/luajit': find(packages, /^usr\/bin\/luajit\S*$/),
    'usr/bin/perl': find(packages, /^usr\/bin\/perl$/),
  }
  for (const [path, source] of Object.entries(programs)) {
    plant(source, tree, path)
    await plantLibraries(source, packages, tree)
  }
  symlinkSync(python, join(tree, 'usr/bin/python3'))
  plant(join(packages, 'usr/lib', python), tree, `usr/lib/${python}`)
  // Parts of Debian's Node that are packages of their own.
  const parts = join(packages, 'usr/share/nodejs')
  if (existsSync(parts)) cpSync(parts, join(tree, 'usr/share/nodejs'), { recursive: true, verbatimSymlinks: true })
  cpSync(join(SOURCES, 'programs'), join(tree, 'bench/programs'), { recursive: true })
  await compileLibrary(packages, tree, python)
  writeFileSync(join(tree, 'bench/file'), head(cc1, 4 * MIB))
  await preprocess(packages, join(tree, 'bench/source.i'))
}

const loader = (packages) => [
  realpathSync(join(packages, LIBRARIES[0], basename(LOADER))),
  ['--library-path', LIBRARIES.map((folder) => join(packages, folder)).join(':')],
]

/** A program's shared libraries under the names that it asks for, as the packages' own loader finds them. */
async function plantLibraries(program, packages, tree) {
  const [command, options] = loader(packages)
  const listed = await output(command, [...options, '--list', program])
  if (!listed) throw new Failure(`${program} lacks libraries; please report it`)
  for (const [, name, path] of listed.matchAll(/^\s*(\S+) => (\S+)/gm)) {
    const target = name.startsWith('/') ? name.slice(1) : join(LIBRARIES[0], name)
    if (!existsSync(join(tree, target))) plant(path, tree, target)
  }
}

/** Python's modules as they are after an installation: compiled. */
async function compileLibrary(packages, tree, python) {
  const [command, options] = loader(packages)
  const code = `import compileall; compileall.compile_dir(${JSON.stringify(join(tree, 'usr/lib', python))}, quiet=2, stripdir=${JSON.stringify(tree)}, invalidation_mode=__import__('py_compile').PycInvalidationMode.UNCHECKED_HASH)`
  const env = { PYTHONHOME: join(packages, 'usr') }
  await run(command, [...options, join(packages, 'usr/bin', python), '-S', '-c', code], { log: 'bench-python', env })
}

/** What a file begins with. */
function head(path, size) {
  const bytes = Buffer.alloc(size)
  const file = openSync(path, 'r')
  try {
    return bytes.subarray(0, readSync(file, bytes, 0, size, 0))
  } finally {
    closeSync(file)
  }
}

/** A real file of C, preprocessed. */
async function preprocess(packages, target) {
  const header = find(packages, /^usr\/include\/stb\/stb_image_write\.h$/)
  const source = `${target}.c`
  writeFileSync(source, `#define STB_IMAGE_WRITE_IMPLEMENTATION\n#include "${header}"\n`)
  await run('gcc', ['-E', '-P', source, '-o', target], { log: 'bench-preprocess' })
  rmSync(source)
}

async function pack(tree, initrd) {
  const { writeInitramfs } = await import('../../dist/images/initramfs.js')
  await writeInitramfs(initrd, [
    { path: '/', type: 'tree', source: tree },
    { path: 'init', type: 'file', source: join(tree, 'init'), mode: 0o755 },
    { path: 'dev/console', type: 'char', major: 5, minor: 1, mode: 0o600 },
  ])
}

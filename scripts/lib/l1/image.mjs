// What L1 boots: Debian's full kernel and a small initramfs with the modules it needs to get at our files and at KVM.
// Made once from packages, by name, and kept beside the guest images.
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync } from 'node:fs'
import { homedir } from 'node:os'
import { basename, dirname, isAbsolute, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { buildPackage } from '../build.mjs'
import { step } from '../progress.mjs'
import { Failure, output } from '../run.mjs'

const INIT = join(dirname(fileURLToPath(import.meta.url)), 'init.sh')

/** Loaded in this order, each after what it depends on. */
const MODULES = ['virtio_pci', '9pnet_virtio', '9p', 'overlay', 'virtio_console', 'virtio_rng', 'kvm_amd']

/** Which tool unpacks a module, and the package it comes in. */
const UNPACKERS = { '.xz': ['xz', 'xz-utils'], '.zst': ['zstd', 'zstd'] }

const cache = () => {
  const xdg = process.env.XDG_CACHE_HOME
  return join(xdg && isAbsolute(xdg) ? xdg : join(homedir(), '.cache'), 'skep', 'l1')
}

/** Module names are written with dashes or underscores as one likes. */
const canonical = (file) =>
  basename(file)
    .replace(/\.ko(\.\w+)?$/, '')
    .replaceAll('-', '_')

/**
 * The kernel and initramfs of L1, made now if they are not there.
 * @param {{ refresh?: boolean }} [options] `refresh` takes today's packages even so
 * @returns {Promise<{ kernel: string, initrd: string }>}
 */
export async function prepareL1({ refresh = false } = {}) {
  const hash = createHash('sha256').update(readFileSync(INIT)).update(MODULES.join()).digest('hex').slice(0, 12)
  const target = join(cache(), hash)
  const image = { kernel: join(target, 'kernel'), initrd: join(target, 'initrd') }
  if (!refresh && existsSync(target)) return image
  await buildPackage()
  mkdirSync(cache(), { recursive: true })
  const folder = mkdtempSync(`${target}.part-`)
  try {
    await step("prepare L1 from Debian's packages", (step) => make(folder, refresh, step))
    if (refresh) rmSync(target, { recursive: true, force: true })
    renameSync(folder, target)
  } catch (error) {
    // Whoever was first has made the same.
    if (!['ENOTEMPTY', 'EEXIST'].includes(error.code)) throw told(error)
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
  return image
}

/** What the package says of a failure is meant for people. */
const told = (error) => (`${error.code}`.startsWith('ERR_IMAGE') ? new Failure(error.message) : error)

async function make(folder, refresh, step) {
  const { Apt, fetchDebianPackages } = await import('../../../dist/images/apt.js')
  const { writeInitramfs } = await import('../../../dist/images/initramfs.js')
  const onProgress = ({ message }) => step.note(message)
  const apt = await Apt.open({ refresh, onProgress })
  const meta = await apt.show('linux-image-amd64')
  const name = meta?.depends.find((depend) => /^linux-image-\d/.test(depend))
  if (!name)
    throw new Failure('the package sources have no linux-image-amd64; add a Debian source to apt (docs/images.md)')

  const packages = join(folder, 'packages')
  await fetchDebianPackages([name, 'busybox-static'], { into: packages, onProgress })
  const files = readdirSync(packages, { recursive: true }).map((path) => join(packages, path))
  const find = (pattern) => {
    const found = files.find((path) => pattern.test(path))
    if (!found) throw new Failure(`package ${name} holds nothing like ${pattern}; please report it`)
    return found
  }
  renameSync(find(/\/boot\/vmlinuz-/), join(folder, 'kernel'))
  const modules = await modulesFor(MODULES, files, readFileSync(find(/\/modules\.builtin$/), 'utf8'))
  const entries = [
    ...['proc', 'sys', 'dev', 'below', 'layer', 'system'].map((path) => ({ path, type: 'directory' })),
    { path: 'dev/console', type: 'char', major: 5, minor: 1, mode: 0o600 },
    { path: 'bin/busybox', type: 'file', source: find(/\/bin\/busybox$/), mode: 0o755 },
    { path: 'init', type: 'file', source: INIT, mode: 0o755 },
    ...modules.map(([module, data]) => ({ path: `modules/${module}`, type: 'file', data })),
    { path: 'modules/order', type: 'file', data: modules.map(([module]) => `${module}\n`).join('') },
  ]
  await writeInitramfs(join(folder, 'initrd'), entries)
  rmSync(packages, { recursive: true })
}

/** Modules and what they depend on, in the order in which they can be loaded: pairs of a name and the unpacked content. */
async function modulesFor(names, files, builtin) {
  const paths = new Map(files.filter((file) => /\.ko(\.\w+)?$/.test(file)).map((file) => [canonical(file), file]))
  const inKernel = new Set(builtin.split('\n').map(canonical))
  const loaded = new Map()
  const visit = async (name) => {
    if (loaded.has(name) || inKernel.has(name)) return
    const path = paths.get(name)
    if (!path) throw new Failure(`Debian's kernel has no module ${name}; please report it`)
    const data = await unpackModule(path)
    // The .modinfo section: strings KEY=VALUE, each ended by a NUL (include/linux/module.h, MODULE_INFO).
    const depends = data.toString('latin1').match(/\0depends=([^\0]*)\0/)?.[1] ?? ''
    for (const depend of depends.split(',').filter(Boolean)) await visit(canonical(depend))
    loaded.set(name, data)
  }
  for (const name of names) await visit(canonical(name))
  return [...loaded]
}

async function unpackModule(path) {
  const [tool, source] = Object.entries(UNPACKERS).find(([suffix]) => path.endsWith(suffix))?.[1] ?? []
  if (!tool) return readFileSync(path)
  if ((await output(tool, ['--decompress', '--quiet', '--keep', path])) === undefined)
    throw new Failure(`${tool} cannot unpack ${path}; is it installed? sudo apt install ${source}`)
  return readFileSync(path.replace(/\.(xz|zst)$/, ''))
}

/** Debian's own kernel and BusyBox, out of Debian's packages. */
import { createHash } from 'node:crypto'
import { copyFile, mkdir, readdir, readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { ImageError } from '../errors.js'
import { Apt, type FetchedPackage, fetchDebianPackages } from './apt.js'
import { type InitramfsEntry, writeInitramfs } from './initramfs.js'
import type { Recipe } from './recipe.js'
import { runTool, toolFailure } from './tools.js'

/** The metapackage that names the kernel of the day, and the package with the tools of the guest. */
const kernelPackage = 'linux-image-cloud-amd64'
const toolsPackage = 'busybox-static'

/** Modules without which the guest does not see its power button. */
const modules = ['button', 'evdev']

const inittab = `::sysinit:/etc/rc
ttyS0::respawn:-/bin/sh
::ctrlaltdel:/sbin/reboot
`

const rc = `#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
hostname guest
for module in /lib/modules/*.ko; do insmod "$module"; done
acpid
echo
echo "Linux $(uname -r) and BusyBox, out of Debian's packages. poweroff ends the machine."
`

/** The power button: the name is the one that acpid gives it. */
const powerButton = `#!/bin/sh
poweroff
`

const profile = `export HOME=/root PATH=/sbin:/usr/sbin:/bin:/usr/bin PS1='# '
cd /root
`

const files: readonly InitramfsEntry[] = [
  ...['proc', 'sys', 'dev', 'run', 'mnt', 'lib/modules', 'etc', 'var/log', 'var/run'].map(
    (path): InitramfsEntry => ({ path, type: 'directory' }),
  ),
  { path: 'root', type: 'directory', mode: 0o700 },
  { path: 'tmp', type: 'directory', mode: 0o1777 },
  // Until devtmpfs is mounted; the kernel opens the console before it runs init.
  { path: 'dev/console', type: 'char', major: 5, minor: 1, mode: 0o600 },
  { path: 'dev/null', type: 'char', major: 1, minor: 3, mode: 0o666 },
  { path: 'init', type: 'symlink', target: 'sbin/init' },
  { path: 'etc/inittab', type: 'file', data: inittab },
  { path: 'etc/rc', type: 'file', data: rc, mode: 0o755 },
  { path: 'etc/profile', type: 'file', data: profile },
  { path: 'etc/passwd', type: 'file', data: 'root:x:0:0:root:/root:/bin/sh\n' },
  { path: 'etc/group', type: 'file', data: 'root:x:0:\n' },
  { path: 'etc/hosts', type: 'file', data: '127.0.0.1 localhost guest\n' },
  { path: 'etc/acpi/PWRF/00000080', type: 'file', data: powerButton, mode: 0o755 },
]

/** Debian's kernel for clouds, and a shell. */
export const debianCloud: Recipe = {
  about: "Debian's kernel for cloud machines (linux-image-cloud-amd64) and a BusyBox shell on the serial console",
  ingredients: ['debian-cloud 1', kernelPackage, toolsPackage, ...modules, JSON.stringify(files)],
  cmdline: 'console=ttyS0',
  prompt: '# ',

  async make(folder, options) {
    const { signal, onProgress } = options
    const image = await kernelImage(options)
    const root = join(folder, 'root')
    try {
      const kernel = await fetchDebianPackages([image.name], {
        signal,
        onProgress,
        into: root,
        paths: ['./boot/vmlinuz-*', ...modules.map((name) => `*/${name}.ko*`)],
      })
      const tools = await fetchDebianPackages([toolsPackage], {
        signal,
        onProgress,
        into: root,
        paths: ['*/bin/busybox'],
      })
      const vmlinuz = (await readdir(join(root, 'boot'))).find((name) => name.startsWith('vmlinuz-'))
      if (vmlinuz === undefined) throw incomplete(image.name, 'a kernel')
      await copyFile(join(root, 'boot', vmlinuz), join(folder, 'kernel'))
      onProgress?.({ message: 'writing the initramfs' })
      await writeInitramfs(join(folder, 'initrd'), await guestFiles(root, signal), { signal })
      return [{ name: kernelPackage, version: image.version }, ...kernel, ...tools]
    } finally {
      await rm(root, { recursive: true, force: true })
    }
  },
}

/** The package with the kernel itself, on which the metapackage depends. */
async function kernelImage(options: Parameters<Recipe['make']>[1]): Promise<FetchedPackage> {
  const apt = await Apt.open(options)
  const meta = await apt.show(kernelPackage, options.signal)
  const name = meta?.depends.find((depend) => /^linux-image-\d/.test(depend))
  if (meta && name !== undefined) return { name, version: meta.version }
  throw new ImageError(
    'ERR_IMAGE_PACKAGE',
    `the host's package sources have no package ${kernelPackage}; it comes from Debian: add a Debian source to apt ` +
      '(see docs/images.md), or boot a kernel of your own with --kernel and --initrd',
    { details: { package: kernelPackage } },
  )
}

async function guestFiles(root: string, signal: AbortSignal | undefined): Promise<InitramfsEntry[]> {
  const found = await findFiles(root)
  const busybox = found.find((file) => /\/bin\/busybox$/.test(file))
  if (busybox === undefined) throw incomplete(toolsPackage, 'busybox')
  const entries: InitramfsEntry[] = [...files, { path: 'bin/busybox', type: 'file', source: busybox, mode: 0o755 }]
  const list = await runTool(busybox, ['--list-full'], { signal })
  if (list.status !== 0) throw toolFailure('busybox --list-full', list)
  for (const applet of list.stdout.split('\n')) {
    if (applet === '' || applet === 'bin/busybox') continue
    entries.push({ path: applet, type: 'symlink', target: '/bin/busybox' })
  }
  for (const [index, name] of modules.entries()) {
    const file = found.find((path) => new RegExp(`/${name}\\.ko(\\.xz|\\.zst)?$`).test(path))
    // Where a module is part of the kernel itself there is no file, and nothing to load.
    if (file === undefined) continue
    const data = await unpackModule(file, signal)
    entries.push({ path: `lib/modules/${index}-${name}.ko`, type: 'file', data })
  }
  return entries
}

/** A module as insmod takes it: Debian compresses them since 2025. */
async function unpackModule(file: string, signal: AbortSignal | undefined): Promise<Buffer> {
  if (file.endsWith('.ko')) return await readFile(file)
  const tool = file.endsWith('.xz') ? 'xz' : 'zstd'
  const result = await runTool(tool, ['--decompress', '--quiet', '--force', '--keep', file], { signal })
  if (result.status !== 0) throw toolFailure(tool, result)
  return await readFile(file.replace(/\.(xz|zst)$/, ''))
}

async function findFiles(root: string): Promise<string[]> {
  await mkdir(root, { recursive: true })
  const entries = await readdir(root, { recursive: true, withFileTypes: true })
  return entries
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name))
    .sort()
}

function incomplete(name: string, part: string): ImageError {
  return new ImageError('ERR_IMAGE_BUILD', `package ${name} does not hold ${part}; please report it`, {
    details: { package: name },
  })
}

/** What a change of which makes another image. */
export function hashOf(recipe: Recipe): string {
  return createHash('sha256')
    .update(JSON.stringify([recipe.ingredients, recipe.cmdline, recipe.prompt]))
    .digest('hex')
    .slice(0, 12)
}

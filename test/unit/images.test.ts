import { spawnSync } from 'node:child_process'
import { chmod, mkdir, mkdtemp, readdir, readFile, rm, stat, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from 'vitest'
import { fetchDebianPackages } from '../../ts/src/images/apt.js'
import { findImage, listImages, prepareImage, removeImage } from '../../ts/src/images/index.js'

// apt without Debian: scripts that do what the real tools do, as far as they are asked, and keep a record.
const tools = {
  'apt-get': `echo "apt-get $*" >> "$LOG"
case "$*" in
  *" update") [ -n "$NO_NETWORK" ] && { echo "E: Failed to fetch http://x  Could not resolve 'x'" >&2; exit 100; }
    for word; do case $word in Dir::State=*) touch "\${word#*=}/lists/x_Packages";; esac; done ;;
  *" install --simulate "*) echo "Inst libc6 (2.36 Debian [amd64])"; echo "Inst python3 (3.11 Debian [amd64])" ;;
  *" download "*) [ -n "$FULL_DISK" ] && { echo "E: Write error - write (28: No space left on device)" >&2; exit 100; }
    for word; do case $word in
      linux-image-6*) cp "$DEBS/kernel" "./\${word%%=*}_1_amd64.deb" ;;
      busybox-static=*) cp "$DEBS/busybox" "./\${word%%=*}_1_amd64.deb" ;;
      libc6=*|python3=*) cp "$DEBS/kernel" "./\${word%%=*}_1_amd64.deb" ;;
    esac; done ;;
esac`,
  'apt-cache': `echo "apt-cache $*" >> "$LOG"
case "$*" in
  *" linux-image-cloud-amd64") printf 'Version: 6.1.9-1\\nDepends: linux-image-6.1.0-9-cloud-amd64 (= 6.1.9-1)\\n' ;;
  *" busybox-static") printf 'Version: 1:1.35\\n' ;;
  *" linux-image-6.1.0-9-cloud-amd64") printf 'Version: 6.1.9-1\\nDepends: kmod, linux-base (>= 4.3~) | x\\n' ;;
  *) echo "E: No packages found" >&2; exit 100 ;;
esac`,
  'dpkg-deb': `[ "$1" = --fsys-tarfile ] && exec cat "$2"; exit 2`,
}

let folder: string
const at = (...path: string[]) => join(folder, ...path)
const log = async () => (await readFile(at('log'), 'utf8').catch(() => '')).trim().split('\n').filter(Boolean)

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'skep-images-'))
  await mkdir(at('bin'))
  for (const [name, script] of Object.entries(tools)) {
    await writeFile(at('bin', name), `#!/bin/sh\n${script}\n`)
    await chmod(at('bin', name), 0o755)
  }
  const deb = async (name: string, files: Record<string, string>) => {
    for (const [path, data] of Object.entries(files)) {
      await mkdir(dirname(at(name, path)), { recursive: true })
      await writeFile(at(name, path), data, { mode: 0o755 })
    }
    spawnSync('tar', ['-C', at(name), '-cf', at('debs', name), '.'])
  }
  await mkdir(at('debs'))
  await deb('kernel', {
    'boot/vmlinuz-6.1.0-9-cloud-amd64': 'the kernel',
    'boot/config-6.1.0-9-cloud-amd64': 'not needed',
    'lib/modules/6.1.0-9-cloud-amd64/kernel/drivers/acpi/button.ko': 'button',
    'lib/modules/6.1.0-9-cloud-amd64/kernel/drivers/input/evdev.ko': 'evdev',
  })
  await deb('busybox', { 'bin/busybox': '#!/bin/sh\nprintf "bin/busybox\\nbin/sh\\nsbin/init\\n"\n' })
})
afterAll(async () => {
  await rm(folder, { recursive: true })
})

/** A fresh cache, and the fake tools before all others. */
async function setUp(environment: Record<string, string> = {}): Promise<void> {
  await rm(at('cache'), { recursive: true, force: true })
  await rm(at('log'), { force: true })
  const values = {
    XDG_CACHE_HOME: at('cache'),
    PATH: `${at('bin')}:${process.env['PATH']}`,
    LOG: at('log'),
    DEBS: at('debs'),
  }
  for (const [name, value] of Object.entries({ ...values, ...environment })) vi.stubEnv(name, value)
}
afterEach(() => vi.unstubAllEnvs())

/** Everything in the cache of images. */
const left = async () => (await readdir(at('cache/skep/images')).catch(() => [])).sort()

describe('an image', () => {
  test('is made once, and found after that without any tool', async () => {
    await setUp()
    const messages: string[] = []
    const image = await prepareImage('debian-cloud', { onProgress: ({ message }) => messages.push(message) })
    expect(image).toMatchObject({
      name: 'debian-cloud',
      cmdline: 'console=ttyS0',
      prompt: '# ',
      packages: {
        'linux-image-cloud-amd64': '6.1.9-1',
        'linux-image-6.1.0-9-cloud-amd64': '6.1.9-1',
        'busybox-static': '1:1.35',
      },
    })
    expect(await readFile(image.kernel, 'utf8')).toBe('the kernel')
    const { stdout } = spawnSync('sh', ['-c', '(cpio -t || busybox cpio -t) < "$0" 2>/dev/null', image.initrd], {
      encoding: 'utf8',
    })
    const names = stdout.split('\n')
    expect(names).toEqual(
      expect.arrayContaining([
        'init',
        'bin/busybox',
        'bin/sh',
        'sbin/init',
        'etc/inittab',
        'lib/modules/0-button.ko',
        'lib/modules/1-evdev.ko',
      ]),
    )
    expect(messages.join('\n')).toMatch(/lists.*downloading.*unpacking.*initramfs/s)
    expect((await left()).map((name) => name.replace(/[\da-f]{12}$/, 'HASH'))).toEqual(['debian-cloud-HASH'])
    expect((await readdir(image.folder)).sort()).toEqual(['initrd', 'kernel', 'manifest.json'])

    vi.stubEnv('PATH', '/nowhere')
    expect(await prepareImage('debian-cloud')).toEqual(image)
    expect(await findImage('debian-cloud')).toEqual(image)
    const [info] = await listImages()
    expect(info).toMatchObject({
      name: 'debian-cloud',
      image,
      size: (await stat(image.kernel)).size + (await stat(image.initrd)).size,
    })
  })

  test('never touches the state of the host: everything of apt is in our folder', async () => {
    await setUp()
    await prepareImage()
    for (const line of await log()) {
      for (const setting of ['Dir::State=', 'Dir::State::status=', 'Dir::Cache='])
        expect(line).toContain(`${setting}${at('cache')}`)
      expect(line).not.toMatch(/Dir::Etc/)
    }
  })

  test('that was damaged is made anew', async () => {
    await setUp()
    const image = await prepareImage()
    await writeFile(image.kernel, 'the kernfl')
    expect(await findImage()).toBeUndefined()
    expect(await readFile((await prepareImage()).kernel, 'utf8')).toBe('the kernel')
  })

  test('is made anew when that is asked for', async () => {
    await setUp()
    await prepareImage()
    const before = (await log()).length
    await prepareImage('debian-cloud', { refresh: true })
    expect((await log()).slice(before).some((line) => line.endsWith(' update'))).toBe(true)
  })

  test('that two want at once is made once', async () => {
    await setUp()
    const [one, two] = await Promise.all([prepareImage(), prepareImage()])
    expect(one).toEqual(two)
    expect((await log()).filter((line) => / download linux-image/.test(line))).toHaveLength(1)
  })

  test('can be removed, and leftovers of a process that was killed go with it', async () => {
    await setUp()
    const { folder: made } = await prepareImage()
    await mkdir(join(dirname(made), `.tmp-${made.slice(dirname(made).length + 1)}`))
    expect(await removeImage('debian-cloud')).toBe(true)
    expect(await left()).toEqual([])
    expect(await removeImage('debian-cloud')).toBe(false)
    expect(await findImage()).toBeUndefined()
  })

  test('that does not exist is not made', async () => {
    await setUp()
    await expect(prepareImage('debian')).rejects.toMatchObject({ code: 'ERR_IMAGE_UNKNOWN', message: /debian-cloud/ })
    await expect(prepareImage('../x')).rejects.toMatchObject({ code: 'ERR_IMAGE_UNKNOWN' })
    await expect(prepareImage('toString')).rejects.toMatchObject({ code: 'ERR_IMAGE_UNKNOWN' })
  })
})

describe('what goes wrong', () => {
  test('no apt: the package to install is named', async () => {
    await setUp({ PATH: '/nowhere' })
    await expect(prepareImage()).rejects.toMatchObject({
      code: 'ERR_IMAGE_TOOL',
      message: /apt-get is not installed.*package apt/,
      details: { package: 'apt' },
    })
    expect(await left()).toEqual([])
  })

  test('no network', async () => {
    await setUp({ NO_NETWORK: '1' })
    await expect(prepareImage()).rejects.toMatchObject({
      code: 'ERR_IMAGE_NETWORK',
      message: /Could not resolve.*proxy/,
    })
    expect(await left()).toEqual([])
  })

  test('a full disk', async () => {
    await setUp({ FULL_DISK: '1' })
    await expect(prepareImage()).rejects.toMatchObject({
      code: 'ERR_IMAGE_DISK',
      message: /No space left.*XDG_CACHE_HOME/,
    })
    expect(await left()).toEqual([])
  })

  test('a cache that is no folder', async () => {
    await setUp()
    await writeFile(at('cache'), '')
    await expect(prepareImage()).rejects.toMatchObject({ code: 'ERR_IMAGE_DISK', message: /XDG_CACHE_HOME/ })
  })

  test('a source without the package', async () => {
    await setUp()
    await expect(fetchDebianPackages(['no-such-package'], { into: at('into') })).rejects.toMatchObject({
      code: 'ERR_IMAGE_PACKAGE',
      details: { package: 'no-such-package' },
    })
  })

  test('a package without what it should hold', async () => {
    await setUp()
    vi.stubEnv('DEBS', at('swapped'))
    await mkdir(at('swapped'), { recursive: true })
    for (const [name, of] of [
      ['kernel', 'kernel'],
      ['busybox', 'kernel'],
    ])
      await symlink(at('debs', of ?? ''), at('swapped', name ?? '')).catch(() => {})
    await expect(prepareImage()).rejects.toMatchObject({ code: 'ERR_IMAGE_BUILD' })
    expect(await left()).toEqual([])
  })

  test('somebody loses patience', async () => {
    await setUp()
    const controller = new AbortController()
    const reason = new Error('enough')
    const preparing = prepareImage('debian-cloud', {
      signal: controller.signal,
      onProgress: ({ message }) => {
        if (message.startsWith('unpacking')) controller.abort(reason)
      },
    })
    await expect(preparing).rejects.toBe(reason)
    expect(await left()).toEqual([])
  })
})

test('packages come with what they depend on, as apt resolves it', async () => {
  await setUp()
  const packages = await fetchDebianPackages(['python3'], { into: at('into-all'), dependencies: true })
  expect(packages).toEqual([
    { name: 'libc6', version: '2.36' },
    { name: 'python3', version: '3.11' },
  ])
  expect(await readdir(at('into-all'))).toEqual(expect.arrayContaining(['boot', 'lib']))
  expect(await readdir(at('into-all'))).not.toContainEqual(expect.stringMatching(/debs/))
})

// Every guest that the boot tests take can be made here; afterwards they are cached, and the boot tests need no network.
import { existsSync } from 'node:fs'
import { expect, test } from 'vitest'
import { debianCloud, debianFull, debianWith, largeInitramfs, packageFile, testKernel } from '../helpers/guests.js'

test.each<[string, () => Promise<string>]>([
  ["Debian's cloud kernel and a shell", async () => (await debianCloud()).initrd],
  ["Debian's full kernel", async () => (await debianFull()).kernel],
  ['a large initramfs with Node', async () => (await largeInitramfs('node')).initrd],
  ['a large initramfs with Python', async () => (await largeInitramfs('python3')).initrd],
  ['stress-ng', async () => (await debianWith('stress-ng', { packages: ['stress-ng'] })).initrd],
  ['LuaJIT', async () => (await debianWith('luajit', { packages: ['luajit'] })).initrd],
  ['memtest86+', () => packageFile('memtest86+', /^boot\/(memtest86\+x64\.bin|mt86\+x64)$/)],
  ['the test kernels', () => testKernel('hello-pvh.elf')],
])('%s', async (_, make) => {
  expect(existsSync(await make())).toBe(true)
})

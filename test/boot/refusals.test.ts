// What bad input gets: a message with a remedy on stderr, nothing on stdout, status 4, and nothing left behind.
import { chmod, mkdir, truncate, writeFile } from 'node:fs/promises'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { accelArgs } from '../helpers/accel.js'
import { Folder, skep } from '../helpers/cli.js'
import { debianCloud, type Guest } from '../helpers/guests.js'

const ERROR = 4

let folder: Folder
let guest: Guest
/** Path of a file of the test's own. */
const at = (name: string) => folder.file(name)

beforeAll(async () => {
  folder = await Folder.make()
  guest = await debianCloud()
  const { copyFile } = await import('node:fs/promises')
  await mkdir(at('folder'))
  await writeFile(at('empty'), '')
  await writeFile(at('garbage'), Buffer.alloc(100_000, 0xa5))
  await copyFile(guest.kernel, at('truncated'))
  await truncate(at('truncated'), 300_000)
  await copyFile(guest.kernel, at('header-only'))
  await truncate(at('header-only'), 0x230)
  await writeFile(at('aarch64'), elf(183))
  await writeFile(at('mips'), elf(8))
  await writeFile(at('secret'), 'no one may read this')
  await chmod(at('secret'), 0)
  await mkdir(at('closed'))
  await chmod(at('closed'), 0o500)
  await writeFile(at('large-initrd'), '')
  await truncate(at('large-initrd'), 600 << 20)
  await writeFile(at('broken.json'), '{ "cpus": ')
  await writeFile(at('wrong.json'), JSON.stringify({ cpus: 1, memroy: '1G', boot: { kernel: guest.kernel } }))
  await writeFile(at('large-rom'), '')
  await truncate(at('large-rom'), 17 << 20)
}, 300_000)

afterAll(async () => {
  await chmod(at('closed'), 0o700)
  await folder[Symbol.asyncDispose]()
})

/** The start of an ELF64 file for `machine` (e_machine). */
function elf(machine: number): Buffer {
  const header = Buffer.alloc(4096)
  Buffer.from([0x7f, 0x45, 0x4c, 0x46, 2, 1, 1]).copy(header)
  header.writeUInt16LE(2, 16)
  header.writeUInt16LE(machine, 18)
  header.writeUInt32LE(1, 20)
  header.writeUInt16LE(64, 52)
  return header
}

/** Root may read and write anything; without these capabilities it is held to the permissions as others are. */
const asUser = process.getuid?.() === 0 ? ['setpriv', '--bounding-set=-dac_override,-dac_read_search', '--'] : []

async function refused(args: string[], message: RegExp, wrapper: string[] = []) {
  const before = await folder.list()
  const { status, stdout, stderr } = await skep(args, { wrapper, env: { TMPDIR: folder.path } })
  expect.soft(stderr).toMatch(message)
  expect.soft(stderr).toMatch(/^skep: /)
  // A person's message, not a defect's.
  expect.soft(stderr).not.toMatch(/^\s+at |panicked|ERR_INTERNAL|undefined|\[object/m)
  expect.soft(stdout).toBe('')
  expect.soft(status).toBe(ERROR)
  expect.soft(await folder.list()).toEqual(before)
}

/** `skep run` of the guest's kernel with further options. */
const run = (...more: string[]) => ['run', ...accelArgs, '--kernel', guest.kernel, '--memory', '256M', ...more]

describe('a kernel that', () => {
  test.each<[string, string, RegExp]>([
    ['does not exist', 'missing', /missing.*(no such file|does not exist)/i],
    ['is a directory', 'folder', /folder.*directory/i],
    ['is empty', 'empty', /empty/i],
    ['is garbage', 'garbage', /garbage.*(bzImage|ELF|multiboot|kernel)/i],
    ['breaks off', 'truncated', /truncated.*(ends|short|truncated|breaks|cut)/i],
    ['breaks off in its header', 'header-only', /header-only/i],
    ['is an ELF for AArch64', 'aarch64', /AArch64/i],
    ['is an ELF for MIPS', 'mips', /MIPS|machine 8/i],
  ])('%s', async (_, name, message) => {
    await refused(['run', '--kernel', at(name), '--memory', '256M'], message)
  })

  test('is /dev/null', () => refused(['run', '--kernel', '/dev/null'], /\/dev\/null/))
  test('may not be read', () => refused(['run', '--kernel', at('secret')], /secret.*(permission|may not)/i, asUser))
  test('is not given', () => refused(['run'], /kernel/))
})

describe('an initrd that', () => {
  test.each<[string, string, RegExp]>([
    ['does not exist', 'missing', /missing.*(no such file|does not exist)/i],
    ['is a directory', 'folder', /folder.*directory/i],
    ['does not fit into memory', 'large-initrd', /(large-initrd|initrd).*(fit|memory)/i],
  ])('%s', async (_, name, message) => {
    await refused(run('--initrd', at(name)), message)
  })
})

describe('a ROM that', () => {
  test('does not exist', () => refused(['run', '--rom', at('missing')], /missing/))
  test('is over 16 MiB', () => refused(['run', '--rom', at('large-rom')], /16 MiB/))
  test('is empty', () => refused(['run', '--rom', at('empty')], /empty/))
})

describe('processors', () => {
  test.each(['0', '1.5', '4096', '-1', 'many', ''])('%j', (cpus) => refused(run('--cpus', cpus), /cpus.*64|1 to 64/i))
})

describe('memory', () => {
  test.each(['1M', '100T', 'banana', '0', '-5G', '1.5', ''])('%j', (size) =>
    refused(['run', '--kernel', guest.kernel, '--memory', size], /memory/i),
  )
})

describe('options', () => {
  test('one that does not exist, with the nearest that does', () =>
    refused(run('--memroy', '1G'), /--memroy.*--memory/))
  test('a command that does not exist', () => refused(['rum'], /rum.*run/))
  test('a value that is missing', () => refused(['run', '--kernel'], /--kernel/))
  test('a configuration that is not JSON', () => refused(['run', '--config', at('broken.json')], /broken\.json/))
  test('a configuration that does not exist', () => refused(['run', '--config', at('missing.json')], /missing\.json/))
  test('a configuration with an unknown key', () => refused(['run', '--config', at('wrong.json')], /memroy.*memory/))
  test('an accelerator that does not exist', () => refused(run('--accel', 'warp'), /warp/))
  test('a timeout that is none', () => refused(run('--timeout', 'soon'), /timeout/))
})

describe('a serial file that', () => {
  test('is a directory', () => refused(run('--serial', `file:${at('folder')}`), /folder/))
  test('is in no folder', () => refused(run('--serial', `file:${at('nowhere/log')}`), /nowhere/))
  test('may not be written', () =>
    refused(run('--serial', `file:${at('closed/log')}`), /closed.*(permission|may not)/i, asUser))
  test('is on a full disk', () =>
    refused(run('--serial', 'file:/dev/full', '--cmdline', 'console=ttyS0 earlyprintk=ttyS0'), /serial port 1.*space/i))
  test('is no kind of serial port', () => refused(run('--serial', 'carrier-pigeon'), /carrier-pigeon/))
})

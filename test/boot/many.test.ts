// Boots in a row, with two vCPUs unless SKEP_BOOT_CPUS says otherwise: races show in the twentieth, not in the first.
import { expect, test } from 'vitest'
import { BOOT_TIMEOUT, Shell } from '../helpers/shell.js'

const CPUS = Number(process.env['SKEP_BOOT_CPUS'] ?? 2)
const BOOTS = Number(process.env['SKEP_BOOTS'] ?? 20)

test.each(Array.from({ length: BOOTS }, (_, index) => index + 1))(
  `boot %i of ${BOOTS}, vCPUs: ${CPUS}, is clean`,
  { timeout: BOOT_TIMEOUT },
  async () => {
    await using shell = await Shell.boot({ cpus: CPUS, memory: '256M' })
    expect(await shell.read('nproc')).toBe(String(CPUS))
    expect(await shell.complaints()).toEqual([])
    shell.type('poweroff -f')
    expect(await shell.vm.exited).toMatchObject({ reason: 'power-off', status: 1 })
  },
)

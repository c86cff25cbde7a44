// Boots in a row with two vCPUs: races show in the twentieth, not in the first.
import { expect, test } from 'vitest'
import { BOOT_TIMEOUT, Shell } from '../helpers/shell.js'

const BOOTS = Number(process.env['SKEP_BOOTS'] ?? 20)

test.each(Array.from({ length: BOOTS }, (_, index) => index + 1))(
  `boot %i of ${BOOTS} with 2 vCPUs is clean`,
  { timeout: BOOT_TIMEOUT },
  async () => {
    await using shell = await Shell.boot({ cpus: 2, memory: '256M' })
    expect(await shell.read('nproc')).toBe('2')
    expect(await shell.complaints()).toEqual([])
    shell.type('poweroff -f')
    expect(await shell.vm.exited).toMatchObject({ reason: 'power-off', status: 1 })
  },
)

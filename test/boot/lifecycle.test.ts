// Ways in which a guest ends, and how each is told.
import { once } from 'node:events'
import { describe, expect, test } from 'vitest'
import { BOOT_TIMEOUT, Shell } from '../helpers/shell.js'

const TIMEOUT = 2 * BOOT_TIMEOUT

describe('the end of a guest', { timeout: TIMEOUT }, () => {
  test('poweroff ends with status 1', async () => {
    await using shell = await Shell.boot({ cpus: 2 })
    shell.type('poweroff -f')
    expect(await shell.vm.exited).toMatchObject({ reason: 'power-off', status: 1 })
  })

  test('halt stops every vCPU and ends with status 2', async () => {
    await using shell = await Shell.boot({ cpus: 2 })
    shell.type('halt -f')
    expect(await shell.vm.exited).toMatchObject({ reason: 'halt', status: 2 })
  })

  test('reboot with onReboot "exit" ends with status 0', async () => {
    await using shell = await Shell.boot({ onReboot: 'exit' })
    shell.type('reboot -f')
    expect(await shell.vm.exited).toMatchObject({ reason: 'reboot', status: 0 })
  })

  test('reboot with onReboot "restart" boots again in the same machine', async () => {
    await using shell = await Shell.boot({ cpus: 2, onReboot: 'restart' })
    await shell.read('echo 1 > /tmp/first-boot')
    const reset = once(shell.vm, 'reset')
    shell.type('reboot -f')
    await reset
    await shell.prompt(BOOT_TIMEOUT)
    expect(shell.vm.state).toBe('running')
    expect((await shell.run('test -e /tmp/first-boot')).status).toBe(1)
    expect(await shell.complaints()).toEqual([])
  })

  test('reset starts again without asking the guest', async () => {
    await using shell = await Shell.boot()
    await shell.read('echo 1 > /tmp/first-boot')
    await shell.vm.reset()
    await shell.prompt(BOOT_TIMEOUT)
    expect((await shell.run('test -e /tmp/first-boot')).status).toBe(1)
  })

  test('panic=-1 reboots after a panic', async () => {
    await using shell = await Shell.boot({ cpus: 2, onReboot: 'exit' }, { cmdline: 'panic=-1' })
    shell.type('echo c > /proc/sysrq-trigger')
    await shell.console.waitFor('Kernel panic - not syncing', { timeout: BOOT_TIMEOUT })
    expect(await shell.vm.exited).toMatchObject({ reason: 'reboot', status: 0 })
  })

  test('kill ends it at any moment, from inside an await too', async () => {
    await using shell = await Shell.boot({ cpus: 2 })
    const waiting = shell.console.waitFor('never printed', { timeout: TIMEOUT })
    waiting.catch(() => {})
    await shell.vm.kill()
    expect(await shell.vm.exited).toMatchObject({ reason: 'killed', status: 4 })
    await expect(waiting).rejects.toMatchObject({ code: 'ERR_CONSOLE_ENDED' })
  })
})

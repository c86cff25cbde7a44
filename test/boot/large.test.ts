// A kernel and an initramfs of the user's own: Debian's full kernel, several hundred MiB of files, a real script.
import { createHash } from 'node:crypto'
import { expect, test } from 'vitest'
import { Vm } from '../../dist/index.js'
import { accel, patience } from '../helpers/accel.js'
import { debianFull, largeInitramfs } from '../helpers/guests.js'

const TIMEOUT = 900_000 * patience

test.each(['node', 'python3'] as const)(
  '%s runs a script from an initramfs of several hundred MiB',
  { timeout: TIMEOUT },
  async (language) => {
    const { kernel } = await debianFull()
    const { initrd, size } = await largeInitramfs(language)
    expect(size).toBeGreaterThan(300 << 20)
    await using vm = await Vm.create({
      cpus: 2,
      memory: '2G',
      accel,
      boot: { kernel, initrd, cmdline: 'console=ttyS0 quiet' },
    })
    const console = vm.console(1)
    await vm.start()
    const [, json = ''] = await console.waitFor(/^RESULT (\{.*\})\r?$/m, { timeout: TIMEOUT })
    const digest = createHash('sha256').update('x'.repeat(1_000_000)).digest('hex')
    expect(JSON.parse(json)).toMatchObject({ language, digest, fibonacci: 6765, sorted: true })
    expect(await vm.exited).toMatchObject({ reason: 'power-off', status: 1 })
  },
)

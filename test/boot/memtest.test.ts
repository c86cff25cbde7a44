// memtest86+, as Debian packages it: not Linux, yet started by the same boot protocol. It sizes memory, reads the
// MADT, drives the screen, the keyboard and the serial port, and then touches every byte there is.
import { expect, test } from 'vitest'
import { Vm } from '../../dist/index.js'
import { accel, patience } from '../helpers/accel.js'
import { packageFile } from '../helpers/guests.js'

test('memtest86+ tests memory and finds no error', { timeout: 600_000 * patience }, async () => {
  const kernel = await packageFile('memtest86+', /^boot\/(memtest86\+x64\.bin|mt86\+x64)$/)
  await using vm = await Vm.create({
    cpus: 1,
    memory: '32M',
    accel,
    boot: { kernel, cmdline: 'console=ttyS0,115200' },
  })
  const console = vm.console(1)
  await vm.start()
  await console.waitFor(/Memtest86\+/, { timeout: 60_000 * patience })
  await console.waitFor(/Status: Testing/, { timeout: 120_000 * patience })
  // The screen is sent in pieces between escape sequences: the second test has begun, so the first is through.
  await console.waitFor(/#[1-9] +\[[A-Z][a-z ]+/, { timeout: 300_000 * patience })
  const [, errors] = await console.waitFor(/Errors: (\d+)\s/, { timeout: 120_000 * patience })
  expect(errors).toBe('0')
})

// `skep run` and the terminal: signals, the escape key, and what is left behind.
import { spawn } from 'node:child_process'
import { setTimeout as sleep } from 'node:timers/promises'
import { beforeAll, describe, expect, test } from 'vitest'
import { accelArgs } from '../helpers/accel.js'
import { Folder, SKEP, start } from '../helpers/cli.js'
import { debianCloud, type Guest } from '../helpers/guests.js'

let guest: Guest
let args: string[]

beforeAll(async () => {
  guest = await debianCloud()
  args = ['run', '--kernel', guest.kernel, '--initrd', guest.initrd, '--cmdline', `${guest.cmdline} earlyprintk=ttyS0`]
  args.push('--memory', '256M', '--cpus', '2', '--serial', 'stdio', ...accelArgs)
}, 300_000)

/** As a shell shows it. */
const SIGNALLED = { SIGTERM: 143, SIGINT: 130, SIGHUP: 129 } as const

describe('a signal', () => {
  test.each(Object.entries(SIGNALLED))('%s ends a running guest with status %i', async (signal, status) => {
    const { child, result, saw } = start(args)
    await saw('Linux version')
    child.kill(signal as NodeJS.Signals)
    expect(await result).toMatchObject({ status })
  })

  // Start-up, loading, the first instructions, a kernel at work.
  test.each([0, 20, 50, 100, 150, 200, 300, 500, 1000, 2000])('^C after %i ms leaves nothing behind', async (ms) => {
    await using folder = await Folder.make()
    const { child, result } = start(args, { env: { TMPDIR: folder.path } })
    await sleep(ms)
    child.kill('SIGINT')
    const { status, stderr } = await result
    expect(status).toBe(SIGNALLED.SIGINT)
    expect(stderr).not.toMatch(/^\s+at |panicked|ERR_INTERNAL/m)
    expect(await folder.list()).toEqual([])
  })
})

test('--timeout ends a guest that does not end itself', async () => {
  const { result } = start([...args, '--timeout', '1500ms'])
  const { status, stderr } = await result
  expect(stderr).toMatch(/time is up after 1\.5 s/)
  expect(status).toBe(4)
})

test('stdin at its end does not end the guest', async () => {
  const { child, result, saw } = start(args)
  child.stdin?.end()
  await saw('Linux version')
  await saw(/Memory: /)
  expect(child.exitCode).toBe(null)
  child.kill('SIGTERM')
  expect(await result).toMatchObject({ status: SIGNALLED.SIGTERM })
})

test('on a terminal, ^] and a full stop end it, and the terminal is as it was', async () => {
  const quoted = ['node', SKEP, ...args].map((word) => `'${word}'`).join(' ')
  const child = spawn('script', ['-qec', `stty -a; ${quoted}; echo status=$?; stty -a`, '/dev/null'], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  let output = ''
  const started = new Promise<void>((resolve) => {
    child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
      output += chunk
      if (output.includes('Linux version')) resolve()
    })
  })
  const ended = new Promise((resolve) => child.once('close', resolve))
  await started
  // ^C belongs to the guest while it has the terminal.
  child.stdin.write('\x03')
  await sleep(300)
  child.stdin.write('\x1d.')
  await ended
  expect(output).toMatch(/status=(4|130)/)
  const settings = output.match(/speed [\s\S]*?-extproc/g)
  expect(settings).toHaveLength(2)
  expect(settings?.[1]).toBe(settings?.[0])
})

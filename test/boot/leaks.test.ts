// 200 machines created, started and killed in one process leave nothing in it.
import { execFile } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { expect, test } from 'vitest'
import { accel, patience } from '../helpers/accel.js'
import { debianCloud } from '../helpers/guests.js'

const CYCLES = Number(process.env['SKEP_CYCLES'] ?? 200)
/** Cycles until allocators, the JIT compiler and thread pools have settled. */
const WARM_UP = Math.min(50, CYCLES >> 2)
/** A guest holds 128 MiB and two stacks: one forgotten machine in a hundred would show. */
const MAX_GROWTH_KIB = 24 << 10

interface Held {
  descriptors: number
  memoryFiles: number
  threads: number
  mappings: number
  guestMappings: number
  residentKib: number
  virtualKib: number
}

test(`${CYCLES} machines leave no memory, thread or descriptor`, { timeout: 600_000 * patience }, async () => {
  const { kernel, initrd, cmdline } = await debianCloud()
  const config = { cpus: 2, memory: '128M', accel, boot: { kernel, initrd, cmdline } }
  const script = fileURLToPath(new URL('../helpers/cycles.mjs', import.meta.url))
  const { stdout } = await promisify(execFile)(
    process.execPath,
    ['--expose-gc', script, JSON.stringify(config), String(CYCLES)],
    {
      maxBuffer: 16 << 20,
    },
  )
  const samples: Held[] = JSON.parse(stdout)
  expect(samples).toHaveLength(CYCLES)
  const warm = samples[WARM_UP]
  const last = samples.at(-1)
  if (!warm || !last) throw new Error('no samples')
  expect(last.memoryFiles).toBe(0)
  expect(last.guestMappings).toBe(0)
  expect(last.descriptors).toBeLessThanOrEqual(warm.descriptors)
  expect(last.threads).toBeLessThanOrEqual(warm.threads)
  // V8 maps thirty or so at once when it likes; one a machine would be more.
  expect(last.mappings - warm.mappings).toBeLessThan((CYCLES - WARM_UP) / 2)
  expect(last.residentKib - warm.residentKib).toBeLessThan(MAX_GROWTH_KIB)
  // Address space: V8 and malloc take theirs in steps of up to 64 MiB (one arena).
  expect(last.virtualKib - warm.virtualKib).toBeLessThan(128 << 10)
})

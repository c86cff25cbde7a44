import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { withLock } from '../../ts/src/images/lock.js'

let folder: string
let file: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'skep-lock-'))
  file = join(folder, 'deep/lock')
})
afterEach(async () => {
  await rm(folder, { recursive: true })
})

test('one at a time, all in the end, and nothing left', async () => {
  let inside = 0
  let most = 0
  const waited: number[] = []
  await Promise.all(
    Array.from({ length: 8 }, () =>
      withLock(file, { onWait: (pid) => waited.push(pid) }, async () => {
        inside += 1
        most = Math.max(most, inside)
        await sleep(5)
        inside -= 1
      }),
    ),
  )
  expect(most).toBe(1)
  expect(waited).toEqual(Array(7).fill(process.pid))
  expect(await readdir(join(folder, 'deep'))).toEqual([])
})

test('is let go when the work fails, and the failure is told', async () => {
  await expect(withLock(file, {}, () => Promise.reject(new Error('no')))).rejects.toThrow('no')
  expect(existsSync(file)).toBe(false)
})

test.each(['a process that has ended', 'a process whose number is used again', 'nonsense'])(
  'of %s is taken over',
  async (whose) => {
    await withLock(file, {}, async () => {})
    const dead = spawnSync(process.execPath, ['-e', '']).pid
    await writeFile(
      file,
      { 'a process that has ended': `${dead} 5`, 'a process whose number is used again': `${process.pid} 5` }[whose] ??
        '?',
    )
    expect(await withLock(file, {}, async () => 'mine')).toBe('mine')
  },
)

test('waiting for it is broken off by the signal', async () => {
  await withLock(file, {}, async () => {
    const controller = new AbortController()
    const second = withLock(
      file,
      { signal: controller.signal, onWait: () => controller.abort(new Error('enough')) },
      async () => {},
    )
    await expect(second).rejects.toThrow('enough')
    expect(existsSync(file)).toBe(true)
  })
  expect(await readdir(join(folder, 'deep'))).toEqual([])
})

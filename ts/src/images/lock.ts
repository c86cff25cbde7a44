/** A lock between processes: a file that names its holder. */
import { randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { link, mkdir, readFile, rename, rm, unlink, writeFile } from 'node:fs/promises'
import { dirname } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Abortable } from '../signal.js'

const poll = 100

/** Runs `action` while this process holds the lock `file`; waits for whoever holds it before. */
export async function withLock<T>(
  file: string,
  options: Abortable & { onWait?: ((pid: number) => void) | undefined },
  action: () => Promise<T>,
): Promise<T> {
  await mkdir(dirname(file), { recursive: true })
  await acquire(file, options)
  try {
    return await action()
  } finally {
    await rm(file, { force: true })
  }
}

async function acquire(
  file: string,
  options: Abortable & { onWait?: ((pid: number) => void) | undefined },
): Promise<void> {
  const own = `${file}.${process.pid}.${randomUUID()}`
  // Written first and linked into place, so that a lock is never seen without its holder.
  await writeFile(own, identity(process.pid) ?? String(process.pid))
  try {
    for (let told = false; ; ) {
      options.signal?.throwIfAborted()
      try {
        await link(own, file)
        return
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error
      }
      const holder = await holderOf(file)
      if (holder === undefined) continue
      if (!isAlive(holder)) {
        await takeAway(file, holder)
        continue
      }
      if (!told) options.onWait?.(Number.parseInt(holder, 10))
      told = true
      await sleep(poll, undefined, { signal: options.signal }).catch(() => {})
    }
  } finally {
    await unlink(own).catch(() => {})
  }
}

async function holderOf(file: string): Promise<string | undefined> {
  try {
    return await readFile(file, 'utf8')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined
    throw error
  }
}

/** A process for good: numbers are used again, and in containers soon, but not with the same time of start (proc(5)). */
function identity(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
    const start = stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19]
    return `${pid} ${start}`
  } catch {
    return undefined
  }
}

function isAlive(holder: string): boolean {
  return identity(Number.parseInt(holder, 10)) === holder
}

/** Removes the lock of a dead process, and puts it back if another took it in the meantime. */
async function takeAway(file: string, dead: string): Promise<void> {
  const aside = `${file}.stale.${randomUUID()}`
  try {
    await rename(file, aside)
  } catch {
    return
  }
  if ((await holderOf(aside)) !== dead) await link(aside, file).catch(() => {})
  await unlink(aside).catch(() => {})
}

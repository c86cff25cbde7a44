// What a process has cost so far.
import { readFileSync } from 'node:fs'

const TICKS_PER_SECOND = 100

/** CPU time of a process in ms, user and system, all threads, and of those of its children that have ended. */
export function cpuTime(pid) {
  const fields = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ').at(-1).split(' ')
  return (fields.slice(11, 15).reduce((sum, ticks) => sum + Number(ticks), 0) * 1000) / TICKS_PER_SECOND
}

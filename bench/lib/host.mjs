// What a measurement was made on; kept with every result.
import { readFileSync } from 'node:fs'
import { cpus, loadavg, release, totalmem } from 'node:os'
import { output } from '../../scripts/lib/run.mjs'

/** The host, the commit and how busy the machine was before the measurement. */
export async function host() {
  return {
    cpu: cpus()[0]?.model ?? 'unknown',
    threads: cpus().length,
    memoryBytes: totalmem(),
    kernel: release(),
    hypervisor: /\bhypervisor\b/.test(readFileSync('/proc/cpuinfo', 'utf8')),
    node: process.version,
    commit: await output('git', ['rev-parse', 'HEAD']),
    dirty: Boolean(await output('git', ['status', '--porcelain'])),
    loadBefore: loadavg()[0],
    date: new Date().toISOString(),
  }
}

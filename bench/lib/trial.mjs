// One boot in a process of its own, timed from the start of the process.
import { spawn } from 'node:child_process'
import { cpuTime } from '../../scripts/lib/cpu-time.mjs'

/**
 * Starts a program whose stdout is the guest's serial console and waits until `marker` shows.
 * @param {string} command
 * @param {string[]} args
 * @param {object} options
 * @param {string} options.marker
 * @param {number} options.timeout in ms
 * @param {Record<string, string>} [options.marks] texts that show before: when they do becomes `NAMEMs` of the result
 * @param {(pid: number) => object} [options.inspect] looks at the process when the marker has shown, while it is stopped;
 *   what it returns becomes part of the result
 * @param {() => void} [options.onStart] called when the program starts
 * @param {() => void} [options.onMarker] called when the marker has shown
 * @returns {Promise<{ wallMs: number, cpuMs: number, [mark: string]: number, report?: unknown }>} `report` is what a program prints as JSON on
 *   its third descriptor once it is told to end (SIGTERM)
 */
export function trial(command, args, { marker, marks = {}, timeout, inspect, onStart, onMarker }) {
  return new Promise((resolve, reject) => {
    const started = performance.now()
    const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe', 'pipe'] })
    let text = ''
    let errors = ''
    let report = ''
    let result
    const marked = {}
    onStart?.()
    const timer = setTimeout(() => child.kill('SIGKILL'), timeout)
    child.stdout.setEncoding('latin1').on('data', (chunk) => {
      text += chunk
      if (result) return
      for (const [name, mark] of Object.entries(marks))
        if (text.includes(mark)) marked[`${name}Ms`] ??= performance.now() - started
      if (!text.includes(marker)) return
      result = { ...marked, wallMs: performance.now() - started, cpuMs: cpuTime(child.pid) }
      onMarker?.()
      if (inspect) {
        child.kill('SIGSTOP')
        Object.assign(result, inspect(child.pid))
      }
      child.kill('SIGTERM')
      if (inspect) child.kill('SIGCONT')
    })
    child.stderr.setEncoding('utf8').on('data', (chunk) => {
      errors += chunk
    })
    child.stdio[3].setEncoding('utf8').on('data', (chunk) => {
      report += chunk
    })
    child.once('error', reject)
    child.once('close', (code, signal) => {
      clearTimeout(timer)
      if (result) resolve(report ? { ...result, report: JSON.parse(report) } : result)
      else
        reject(
          new Error(
            `${command} did not print ${JSON.stringify(marker)} (status ${code ?? signal}):\n${errors}\n${text.slice(-2000)}`,
          ),
        )
    })
  })
}

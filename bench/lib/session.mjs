// A process that obeys orders, a line each (bench/cpu/guest.c, `guest serve`): a machine by its serial console, or the program
// itself. When its lines arrive is noted by this machine's clock.
import { spawn } from 'node:child_process'
import { cpuTime } from '../../scripts/lib/cpu-time.mjs'
import { lines } from '../../scripts/lib/lines.mjs'

const PATIENCE = 5_000
const KEPT = 30

/** One such process. */
export class Session {
  #child
  #started = performance.now()
  #said = []
  #errors = ''
  #report = ''
  #ended
  #machine
  #take = () => {}

  /**
   * @param {string} command
   * @param {string[]} args
   * @param {{ machine?: boolean }} [options] whether the process is a machine, whose processor time is what its orders cost; else
   *   it is the program itself, which tells
   */
  constructor(command, args, { machine = true } = {}) {
    this.#machine = machine
    this.#child = spawn(command, args, { stdio: ['pipe', 'pipe', 'pipe', 'pipe'] })
    // However this process ends, that one does not outlive it.
    process.once('exit', () => this.#child.kill('SIGKILL'))
    this.#child.stdout.on(
      'data',
      lines((line) => {
        this.#said.push(line)
        if (this.#said.length > KEPT) this.#said.shift()
        this.#take(line)
      }),
    )
    this.#child.stderr.setEncoding('utf8').on('data', (chunk) => {
      this.#errors = `${this.#errors}${chunk}`.slice(-2000)
    })
    this.#child.stdio[3].setEncoding('utf8').on('data', (chunk) => {
      this.#report += chunk
    })
    // Whoever has ended reads no more.
    this.#child.stdin.on('error', () => {})
    this.#ended = new Promise((resolve) => {
      this.#child.once('error', (error) => resolve(error.message))
      this.#child.once('close', (code, signal) => resolve(`${command} has ended (${signal ?? `status ${code}`})`))
    })
  }

  /** Waits until orders are taken; the milliseconds since the start of the process. */
  async ready(timeout) {
    await this.#until(timeout, (line, done) => line === '@ready' && done())
    return performance.now() - this.#started
  }

  /**
   * Gives an order and waits until it has been obeyed.
   * @returns {Promise<{ skipped: string } | { guestNs: number, hostNs: number, cpuMs: number, operations: number, firstNs: number }>}
   *   `guestNs` is by the guest's clock, `hostNs` by this machine's
   */
  async order(text, timeout) {
    let begun
    let result
    const other = []
    const answered = this.#until(timeout, (line, done, fail) => {
      const [word, ...rest] = line.split(' ')
      if (word === '@begin') begun = this.#reading()
      else if (word === '@end') {
        const ended = this.#reading()
        const [guestNs, operations, firstNs, cpuNs] = rest.map(Number)
        const hostNs = Math.round((ended.at - begun.at) * 1e6)
        const cpuMs = this.#machine ? ended.cpuMs - begun.cpuMs : cpuNs / 1e6
        result = { guestNs, hostNs, cpuMs, operations, firstNs }
      } else if (word === '@skip') result = { skipped: rest.join(' ') }
      else if (word === '@status') {
        if (rest[0] === '0' && result) done(result)
        else fail(new Error(`status ${rest[0]}: ${other.slice(-5).join(' | ')}`))
      } else other.push(line)
    })
    this.#child.stdin.write(`${text}\n`)
    return await answered
  }

  /** Ends the process; what it has reported, if it has (bench/lib/skep-boot.mjs). */
  async close() {
    this.#child.kill('SIGTERM')
    const timer = setTimeout(() => this.#child.kill('SIGKILL'), PATIENCE)
    await this.#ended
    clearTimeout(timer)
    return this.#report ? JSON.parse(this.#report) : undefined
  }

  #reading() {
    return { at: performance.now(), cpuMs: cpuTime(this.#child.pid) }
  }

  /** Until `take` calls one of the functions that it is given with each line. An error that ends the session is `fatal`. */
  #until(timeout, take) {
    return new Promise((resolve, reject) => {
      const over = (settle) => (value) => {
        clearTimeout(timer)
        this.#take = () => {}
        settle(value)
      }
      const fail = over(reject)
      const fatal = (why) => fail(Object.assign(new Error(`${why}: ${this.#lastWords()}`), { fatal: true }))
      const timer = setTimeout(() => fatal(`no answer in ${timeout / 1000} s`), timeout)
      this.#take = (line) => {
        try {
          take(line, over(resolve), fail)
        } catch (error) {
          fail(error)
        }
      }
      this.#ended.then(fatal)
    })
  }

  #lastWords() {
    const said = this.#said.filter((line) => line && !line.startsWith('@'))
    return [this.#errors.trim(), ...said.slice(-6)].filter(Boolean).join(' | ') || 'it said nothing'
  }
}

// Progress of a script that a person waits for: one line a step with the time it took. On a terminal the running
// step is redrawn in place with the last line of its output; elsewhere its milestones are printed as they come, and
// a sign of life at least every 20 s. Everything goes to stderr: stdout stays free for data.
import { stderr } from 'node:process'

const HEARTBEAT = 20_000
const REDRAW = 120
const FRAMES = '⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏'

const live = Boolean(stderr.isTTY) && !process.env.CI
const coloured = live && !process.env.NO_COLOR
const paint = (code, text) => (coloured ? `\x1b[${code}m${text}\x1b[0m` : text)

/** Time in a form a person reads at a glance. */
export function duration(ms) {
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`
  const seconds = Math.round(ms / 1000)
  return `${Math.floor(seconds / 60)} min ${String(seconds % 60).padStart(2, '0')} s`
}

/** Removes escape sequences and control characters, so that a line of output can be shown anywhere. */
export function plain(text) {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what is looked for
  return text.replace(/\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]|[\x00-\x08\x0b-\x1f\x7f]/g, '')
}

/** One step while it runs. */
class Step {
  #title
  #started = Date.now()
  #spoken = Date.now()
  #last = ''
  #timer
  #frame = 0

  constructor(title) {
    this.#title = title
    if (live) {
      this.#timer = setInterval(() => this.#draw(), REDRAW)
    } else {
      this.#say(`▸ ${title}`)
      this.#timer = setInterval(() => {
        if (Date.now() - this.#spoken >= HEARTBEAT)
          this.#say(`  … ${title}: ${duration(this.elapsed)}${this.#last ? `, ${this.#last}` : ''}`)
      }, 1_000)
    }
    this.#timer.unref()
  }

  get elapsed() {
    return Date.now() - this.#started
  }

  /** The latest thing the step has done. A milestone is kept on the screen, anything else is replaced by the next. */
  note(text, { milestone = false } = {}) {
    const line = plain(text).trim()
    if (!line) return
    // The margins that compilers draw round a piece of code say nothing.
    if (/^[\p{L}\p{N}✓✗×[(]/u.test(line)) this.#last = line.slice(0, 160)
    if (!milestone) return
    if (live) {
      this.#clear()
      stderr.write(`  ${paint(2, line)}\n`)
    } else {
      this.#say(`  ${line}`)
    }
  }

  done(text = '') {
    this.#end(paint(32, '✓'), text)
  }

  fail() {
    this.#end(paint(31, '✗'), '')
  }

  #end(mark, text) {
    clearInterval(this.#timer)
    if (live) this.#clear()
    stderr.write(`${mark} ${this.#title}${text ? `: ${text}` : ''}  ${paint(2, duration(this.elapsed))}\n`)
  }

  #say(line) {
    this.#spoken = Date.now()
    stderr.write(`${line}\n`)
  }

  #clear() {
    stderr.write('\r\x1b[2K')
  }

  #draw() {
    this.#frame = (this.#frame + 1) % FRAMES.length
    const head = `${FRAMES[this.#frame]} ${this.#title}  ${duration(this.elapsed)}`
    const room = (stderr.columns ?? 80) - head.length - 3
    const tail = room > 8 && this.#last ? `  ${paint(2, this.#last.slice(0, room))}` : ''
    stderr.write(`\r\x1b[2K${head}${tail}`)
  }
}

/**
 * Runs `work` as a step called `title`. What it returns as text is shown behind the title.
 * @template T
 * @param {string} title
 * @param {(step: Step) => Promise<T>} work
 * @returns {Promise<T>}
 */
export async function step(title, work) {
  const running = new Step(title)
  try {
    const result = await work(running)
    running.done(typeof result === 'string' ? result : '')
    return result
  } catch (error) {
    running.fail()
    throw error
  }
}

/** Says that a step had nothing to do. */
export function skip(title) {
  stderr.write(`${paint(2, `· ${title}`)}\n`)
}

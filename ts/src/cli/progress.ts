/** A line of progress on standard error: redrawn on a terminal, and each once elsewhere. */
import { colors } from './context.js'

/** The line. */
export class Progress {
  readonly #stream: NodeJS.WriteStream
  readonly #live: boolean
  #last = ''

  constructor(stream: NodeJS.WriteStream) {
    this.#stream = stream
    this.#live = Boolean(stream.isTTY) && process.env['TERM'] !== 'dumb'
  }

  /** Shows what is being done. */
  show(text: string): void {
    if (text === this.#last) return
    this.#last = text
    if (!this.#live) {
      this.#stream.write(`${text}\n`)
      return
    }
    const width = Math.max(20, (this.#stream.columns ?? 80) - 1)
    this.#stream.write(`\r\x1b[2K${colors(this.#stream).dim(text.slice(0, width))}`)
  }

  /** Takes the line away. */
  clear(): void {
    if (this.#live && this.#last !== '') this.#stream.write('\r\x1b[2K')
    this.#last = ''
  }
}

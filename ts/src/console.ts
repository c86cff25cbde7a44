/**
 * Serial consoles: duplex streams with scroll-back, back-pressure, and waiting for text.
 *
 * @module
 */
import { Duplex } from 'node:stream'
import { StringDecoder } from 'node:string_decoder'
import { ArgumentError, ConsoleError } from './errors.js'
import type { VmExit } from './events.js'
import { type ConsoleMatch, Expect } from './expect.js'
import { Scrollback } from './scrollback.js'
import { type Abortable, abortable } from './signal.js'

/** How a console is waited on. */
export interface WaitForOptions extends Abortable {
  /** Milliseconds until the wait is given up. Default: none. */
  timeout?: number | undefined
}

/** How lines are read. */
export interface LinesOptions extends Abortable {
  /** Whether to start with the scroll-back rather than with the next output. Default `true`. */
  replay?: boolean | undefined
}

/** What a console needs of its machine. */
export interface ConsoleWire {
  /** Hands input to the guest and says how many bytes were taken. */
  write(data: Buffer): number
  /** Says that so many bytes of output have been dealt with. */
  credit(bytes: number): void
}

/** Bytes of scroll-back where nothing else is asked for. */
export const defaultScrollback: number = 256 * 1024
/** Bytes of output that errors carry. */
const tailLength = 8 * 1024
/** Lines of output that messages show. */
const tailLines = 10
/** Longest line in characters; a longer one is cut. */
const maxLine = 64 * 1024
/** Bytes moved at a time. */
const chunkSize = 64 * 1024

/** Reads a port's output at its own pace. While it lags a whole window behind, the guest's serial port waits. */
class Reader {
  offset: number
  wake: (() => void) | undefined

  constructor(offset: number) {
    this.offset = offset
  }
}

/** A serial port as this side of the seam sees it: the scroll-back and all who read it, and the input under way. */
export class ConsolePort {
  readonly port: number
  readonly #wire: ConsoleWire
  readonly #scrollback: Scrollback
  readonly #expect = new Expect()
  readonly #readers = new Set<Reader>()
  readonly #input: { data: Buffer; done: () => void }[] = []
  #credited = 0
  #exit: VmExit | undefined
  #ended = false

  constructor(port: number, wire: ConsoleWire, scrollback: number, window: number) {
    this.port = port
    this.#wire = wire
    this.#scrollback = new Scrollback(scrollback, window)
  }

  /** Takes output of the guest. */
  receive(data: Buffer): void {
    this.#scrollback.write(data)
    this.#expect.write(data)
    for (const reader of this.#readers) reader.wake?.()
    this.#credit()
  }

  /** The guest takes input again. */
  drained(): void {
    this.#flush()
  }

  /** The machine has ended, and all of its output has been received. */
  end(exit: VmExit): void {
    if (this.#ended) return
    this.#ended = true
    this.#exit = exit
    this.#expect.end()
    for (const reader of this.#readers) reader.wake?.()
    this.#flush()
  }

  get ended(): boolean {
    return this.#ended
  }

  attach(replay: boolean): Reader {
    const reader = new Reader(replay ? this.#scrollback.oldest : this.#scrollback.total)
    this.#readers.add(reader)
    return reader
  }

  detach(reader: Reader): void {
    this.#readers.delete(reader)
    this.#credit()
  }

  /** The next bytes for `reader`, empty if there are none at present. */
  read(reader: Reader): Buffer {
    const { start, data } = this.#scrollback.read(reader.offset, chunkSize)
    reader.offset = start + data.length
    this.#credit()
    return data
  }

  /** Queues input; `done` when the guest has it, or never will. */
  write(data: Buffer, done: () => void): void {
    this.#input.push({ data, done })
    if (this.#input.length === 1) this.#flush()
  }

  waitFor(pattern: string | RegExp, options: WaitForOptions): Promise<ConsoleMatch> {
    const shown = typeof pattern === 'string' ? JSON.stringify(pattern) : String(pattern)
    return this.#expect.search(pattern, {
      ...options,
      onTimeout: () => {
        const message = `${shown} did not appear on console ${this.port} within ${options.timeout} ms`
        return this.#failure('ERR_CONSOLE_TIMEOUT', message, { timeout: options.timeout })
      },
      onEnd: () => {
        const message = `the machine ended (${this.#exit?.reason}) before ${shown} appeared on console ${this.port}`
        return this.#failure('ERR_CONSOLE_ENDED', message, { exit: this.#exit })
      },
    })
  }

  tail(length: number): Buffer {
    return this.#scrollback.tail(length)
  }

  #failure(code: ConsoleError['code'], message: string, details: Record<string, unknown>): ConsoleError {
    const output = this.tail(tailLength).toString()
    return new ConsoleError(code, message + lastLines(output), { output, details: { port: this.port, ...details } })
  }

  /** Tells the guest's side how much has been read by the slowest reader; all of it if there is none. */
  #credit(): void {
    let read = this.#scrollback.total
    for (const reader of this.#readers) read = Math.min(read, reader.offset)
    if (read <= this.#credited) return
    const bytes = read - this.#credited
    this.#credited = read
    if (!this.#ended) this.#wire.credit(bytes)
  }

  #flush(): void {
    for (let next = this.#input[0]; next; next = this.#input[0]) {
      // Nobody takes the input of a machine that has ended: it is dropped, as at the end of a loose cable.
      const taken = this.#ended ? next.data.length : this.#wire.write(next.data)
      if (taken < next.data.length) {
        next.data = next.data.subarray(taken)
        return
      }
      this.#input.shift()
      next.done()
    }
  }
}

function lastLines(output: string): string {
  const lines = output.trimEnd().split(/\r?\n/)
  if (output.trim() === '') return '; there was no output'
  return `; the last output was:\n${lines
    .slice(-tailLines)
    .map((line) => `  ${line}`)
    .join('\n')}`
}

/**
 * A serial console of a machine, from {@link Vm.console}.
 *
 * It is a duplex stream of bytes: what is written is typed into the guest, what is read is what the guest says. Reading
 * starts with the scroll-back (256 KiB unless asked otherwise), so nothing is missed by reading late. Once somebody reads,
 * back-pressure reaches into the guest: its serial port waits while the reader is 256 KiB behind. While nobody reads, output
 * goes to the scroll-back alone and the guest never waits. Input waits until the guest takes it; input to a machine that has
 * ended is dropped. The stream ends when the machine does.
 *
 * @example
 * ```ts
 * const console = vm.console(1)
 * console.pipe(process.stdout)
 * await console.waitFor('# ', { timeout: 30_000 })
 * console.write('uname -a\n')
 * const [line] = await console.waitFor(/^Linux .*$/m)
 * ```
 */
export class Console extends Duplex {
  /** Serial port, 1 to 4. */
  readonly port: number
  readonly #port: ConsolePort
  #reader: Reader | undefined
  /** The stream's own buffer is full: wait until it asks for more. */
  #full = false
  #finished = false

  /** @internal */
  constructor(port: ConsolePort) {
    super({ decodeStrings: true, emitClose: true, readableHighWaterMark: chunkSize })
    this.#port = port
    this.port = port.port
  }

  /**
   * Waits until the guest has said `pattern`, and returns the match; groups follow it, as of `RegExp.exec`. What is searched
   * is the text as a person reads it: UTF-8, without escape sequences (colours, questions to the terminal). The stream and
   * {@link Console.lines} have those.
   *
   * Each console has one cursor. It starts where the output starts, and every match moves it to the match's end: what has
   * been matched, and what came before it, is not seen again. Searching does not take output away from who reads the stream.
   * Calls that wait at the same time all start at the cursor of the moment of their call, so `Promise.race` of two waits
   * does what it says. Output of more than 256 Ki characters that nothing has matched is forgotten from its start.
   *
   * A string matches as soon as its last character is there. So does a regular expression: `/\d+/` may match the `1` of a
   * `12` that is still being printed. With the flag `m` only whole lines are looked at (and the last one when the machine
   * has ended), so that `/^Linux .*$/m` gives the whole line, whether it ends with `\r\n` or `\n`; a prompt, after which
   * no line ends, wants a string or an expression without `m`. The flags `g` and `y` are ignored.
   *
   * @throws ConsoleError `ERR_CONSOLE_TIMEOUT` when `timeout` has passed, `ERR_CONSOLE_ENDED` when the machine ends first;
   *   both carry the last output. An aborted `signal` rejects with its reason.
   */
  async waitFor(pattern: string | RegExp, options: WaitForOptions = {}): Promise<ConsoleMatch> {
    const { timeout, signal, ...others } = options
    if (typeof pattern !== 'string' && !(pattern instanceof RegExp)) {
      throw new ArgumentError('ERR_ARGUMENT', 'waitFor takes a string or a regular expression')
    }
    const unknown = Object.keys(others)[0]
    if (unknown !== undefined) {
      throw new ArgumentError('ERR_ARGUMENT', `waitFor has no option "${unknown}"; it has timeout and signal`)
    }
    if (timeout !== undefined && !(timeout >= 0 && timeout <= 2 ** 31 - 1)) {
      throw new ArgumentError('ERR_ARGUMENT', `timeout: expected milliseconds from 0 to ${2 ** 31 - 1}, got ${timeout}`)
    }
    return await this.#port.waitFor(pattern, { timeout, signal })
  }

  /**
   * The output line by line, without line ends, until the machine ends. Starts with the scroll-back unless `replay` is
   * `false`. Has the back-pressure of a reader while it is being iterated.
   *
   * @example
   * ```ts
   * for await (const line of vm.console(1).lines({ signal })) log(line)
   * ```
   */
  async *lines(options: LinesOptions = {}): AsyncGenerator<string, void, undefined> {
    const { signal, replay = true } = options
    signal?.throwIfAborted()
    const decoder = new StringDecoder('utf8')
    const reader = this.#port.attach(replay)
    try {
      let rest = ''
      for (;;) {
        const data = this.#port.read(reader)
        if (data.length === 0) {
          if (this.#port.ended) break
          const more = new Promise<void>((resolve) => {
            reader.wake = resolve
          })
          await abortable(more, signal)
          continue
        }
        const lines = (rest + decoder.write(data)).split('\n')
        rest = lines.pop() ?? ''
        if (rest.length > maxLine) {
          lines.push(rest)
          rest = ''
        }
        for (const line of lines) {
          yield line.replace(/\r+$/, '')
          signal?.throwIfAborted()
        }
      }
      rest += decoder.end()
      if (rest !== '') yield rest
    } finally {
      this.#port.detach(reader)
    }
  }

  /** The last of the output, up to `length` bytes and not more than the scroll-back holds. */
  tail(length: number = tailLength): Buffer {
    return this.#port.tail(length)
  }

  override _read(): void {
    if (!this.#reader) {
      this.#reader = this.#port.attach(true)
      this.#reader.wake = () => this.#pump()
    }
    this.#full = false
    this.#pump()
  }

  #pump(): void {
    const reader = this.#reader
    if (!reader) return
    while (!this.#full && !this.#finished) {
      const data = this.#port.read(reader)
      if (data.length > 0) {
        this.#full = !this.push(data)
      } else if (this.#port.ended) {
        this.#finished = true
        this.push(null)
      } else {
        return
      }
    }
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: () => void): void {
    this.#port.write(chunk, done)
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    if (this.#reader) this.#port.detach(this.#reader)
    this.#reader = undefined
    done(error)
  }

  /** Stops reading. The machine goes on, and {@link Vm.console} gives the same port anew. */
  override async [Symbol.asyncDispose](): Promise<void> {
    this.destroy()
  }
}

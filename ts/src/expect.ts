/** Waiting for text in a stream of output. */
import { addAbortListener } from 'node:events'
import { StringDecoder } from 'node:string_decoder'
import { PlainText } from './plain.js'

/**
 * What was found: the text that matched, then the groups of the regular expression, as of `RegExp.exec`.
 */
export type ConsoleMatch = [match: string, ...groups: string[]] & {
  /** Named groups of the regular expression. */
  readonly groups: Record<string, string> | undefined
  /** The output between where the search began and the match. */
  readonly before: string
}

/** Text that is always kept to be searched, in UTF-16 code units. */
const maxText = 256 * 1024

interface Waiter {
  readonly pattern: string | RegExp
  /** Absolute position from which it searches. */
  from: number
  /** Absolute position up to which it has searched in vain. */
  searched: number
  settle(match: ConsoleMatch): void
  fail(reason: unknown): void
}

/** How a wait may end without a match. */
export interface SearchOptions {
  signal?: AbortSignal | undefined
  /** Milliseconds. */
  timeout?: number | undefined
  /** Makes the error for when time is up. */
  onTimeout(): Error
  /** Makes the error for when the output has ended. */
  onEnd(): Error
}

/**
 * Finds text in output as it comes, in what a person would read: escape sequences are left out. There is one cursor: it starts where the output starts and moves to the end of every
 * match. A search begins at the cursor of the moment at which it is asked for, so searches that wait at the same time see
 * the same text.
 */
export class Expect {
  readonly #decoder = new StringDecoder('utf8')
  readonly #plain = new PlainText()
  readonly #waiters = new Set<Waiter>()
  #text = ''
  /** Absolute position of the first unit of `#text`. */
  #base = 0
  #cursor = 0
  #ended = false

  /** Takes output. */
  write(data: Buffer): void {
    this.#text += this.#plain.write(this.#decoder.write(data))
    this.#search()
    this.#trim()
  }

  /** No more output will come. */
  end(): void {
    if (this.#ended) return
    this.#text += this.#plain.write(this.#decoder.end())
    this.#ended = true
    this.#search()
  }

  /** Waits for `pattern`. */
  async search(pattern: string | RegExp, options: SearchOptions): Promise<ConsoleMatch> {
    const { signal, timeout, onTimeout, onEnd } = options
    signal?.throwIfAborted()
    let timer: NodeJS.Timeout | undefined
    let abort: Disposable | undefined
    let waiter: Waiter | undefined
    try {
      return await new Promise<ConsoleMatch>((settle, reject) => {
        waiter = {
          pattern: typeof pattern === 'string' ? pattern : stateless(pattern),
          from: this.#cursor,
          searched: this.#cursor,
          settle,
          fail: () => reject(onEnd()),
        }
        this.#waiters.add(waiter)
        if (this.#try(waiter)) return
        if (timeout !== undefined) timer = setTimeout(() => reject(onTimeout()), timeout)
        if (signal) abort = addAbortListener(signal, () => reject(signal.reason))
      })
    } finally {
      clearTimeout(timer)
      abort?.[Symbol.dispose]()
      if (waiter) this.#waiters.delete(waiter)
    }
  }

  #search(): void {
    for (const waiter of this.#waiters) this.#try(waiter)
  }

  /** True if the waiter is done. */
  #try(waiter: Waiter): boolean {
    waiter.from = Math.max(waiter.from, this.#base)
    const text = this.#text.slice(waiter.from - this.#base, this.#visible(waiter.pattern))
    const end = waiter.from + text.length
    const found = end > waiter.searched || this.#ended ? find(waiter, text) : undefined
    waiter.searched = end
    if (found) {
      this.#waiters.delete(waiter)
      this.#cursor = Math.max(this.#cursor, waiter.from + found.end)
      waiter.settle(found.match)
      return true
    }
    if (this.#ended) {
      this.#waiters.delete(waiter)
      waiter.fail(undefined)
    }
    return this.#ended
  }

  /** How much of the text a pattern sees: with the flag `m` whole lines only, so that `$` is the end of a line. */
  #visible(pattern: string | RegExp): number {
    if (typeof pattern === 'string' || !pattern.multiline || this.#ended) return this.#text.length
    return this.#text.lastIndexOf('\n') + 1
  }

  #trim(): void {
    let keep = this.#cursor
    for (const { from } of this.#waiters) keep = Math.min(keep, from)
    // Twice as much before anything is forgotten, so that a flood of output is not copied once a chunk.
    if (this.#text.length > 2 * maxText) keep = Math.max(keep, this.#base + this.#text.length - maxText)
    if (keep <= this.#base) return
    this.#text = this.#text.slice(keep - this.#base)
    this.#base = keep
    this.#cursor = Math.max(this.#cursor, keep)
  }
}

/** Searches must not depend on, nor change, the state that the flags `g` and `y` give a regular expression. */
function stateless(pattern: RegExp): RegExp {
  return new RegExp(pattern.source, pattern.flags.replace(/[gy]/g, ''))
}

function find(waiter: Waiter, text: string): { match: ConsoleMatch; end: number } | undefined {
  const { pattern } = waiter
  if (typeof pattern === 'string') {
    const start = Math.max(0, waiter.searched - waiter.from - pattern.length + 1)
    const index = text.indexOf(pattern, start)
    if (index < 0) return undefined
    return { match: matchOf([pattern], undefined, text.slice(0, index)), end: index + pattern.length }
  }
  const found = pattern.exec(text)
  if (!found) return undefined
  const [match, ...groups] = found
  return {
    match: matchOf([match, ...groups], found.groups, text.slice(0, found.index)),
    end: found.index + match.length,
  }
}

function matchOf(
  parts: [string, ...string[]],
  groups: Record<string, string> | undefined,
  before: string,
): ConsoleMatch {
  return Object.assign(parts, { groups, before })
}

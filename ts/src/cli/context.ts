/** What every command is given, and how a command line ends. */
import { constants } from 'node:os'
import type { Writable } from 'node:stream'
import pc from 'picocolors'
import { isSkepError, type SkepError } from '../errors.js'

/** Exit statuses that are not those of a guest. */
export const status: { readonly ok: 0; readonly error: 4 } = { ok: 0, error: 4 }

/** A mistake on the command line. */
export class UsageError extends Error {
  override readonly name = 'UsageError'
}

/** What we print goes nowhere. */
export class OutputError extends Error {
  override readonly name = 'OutputError'
}

/** The process was asked to end. */
export class Interrupted extends Error {
  override readonly name = 'Interrupted'
  /** 128 + n, as a shell has it. */
  readonly status: number

  constructor(signal: NodeJS.Signals) {
    super(`ended by ${signal}`)
    this.status = 128 + constants.signals[signal]
  }
}

/** What a command works with. */
export interface Context {
  /** Aborted when the process is asked to end, by an {@link Interrupted}. */
  readonly signal: AbortSignal
  readonly stdin: NodeJS.ReadStream
  /** Data. */
  readonly stdout: NodeJS.WriteStream
  /** Talk. */
  readonly stderr: NodeJS.WriteStream
}

/** Colours for a stream: on a terminal, unless NO_COLOR, or where FORCE_COLOR says so. */
export function colors(stream: NodeJS.WriteStream): ReturnType<typeof pc.createColors> {
  const { NO_COLOR, FORCE_COLOR, TERM } = process.env
  if (NO_COLOR) return pc.createColors(false)
  if (FORCE_COLOR) return pc.createColors(FORCE_COLOR !== '0')
  return pc.createColors(Boolean(stream.isTTY) && TERM !== 'dumb')
}

/** Prints an error for a person: what it is, its code, and what to do about it. */
export function printError(error: unknown, context: Pick<Context, 'stderr'>): void {
  const color = colors(context.stderr)
  const say = (text: string): void => void context.stderr.write(`${color.red('skep:')} ${text}\n`)
  if (error instanceof UsageError || error instanceof OutputError) {
    say(error.message)
  } else if (isSkepError(error)) {
    say(`${error.message} ${color.dim(`[${error.code}]`)}`)
    const hint = remedyFor(error)
    if (hint) context.stderr.write(`      ${hint}\n`)
  } else {
    const text = error instanceof Error ? (error.stack ?? error.message) : String(error)
    say(`internal error, please report it: ${text}`)
  }
}

/** The remedy of the table where the message has none of its own. */
function remedyFor(error: SkepError): string | undefined {
  if (/^ERR_(CONFIG|SPEC)_/.test(error.code) || error.message.includes(';')) return undefined
  return error.remedy
}

/** Writes, and waits where the reader is slow. */
export async function print(stream: Writable, text: string): Promise<void> {
  if (stream.write(text) || stream.destroyed) return
  await new Promise<void>((resolve) => {
    const done = (): void => {
      stream.off('drain', done)
      stream.off('close', done)
      resolve()
    }
    stream.once('drain', done)
    stream.once('close', done)
  })
}

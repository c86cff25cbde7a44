#!/usr/bin/env node
/** The command `skep`. */
import { CommanderError } from 'commander'
import { type Context, Interrupted, printError, status } from './context.js'
import { createProgram, usageError } from './program.js'

const controller = new AbortController()
const context: Context = {
  signal: controller.signal,
  stdin: process.stdin,
  stdout: process.stdout,
  stderr: process.stderr,
}

for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
  process.on(name, () => {
    const reason = new Interrupted(name)
    // Asked twice: whatever takes so long is not waited for.
    if (controller.signal.aborted) process.exit(reason.status)
    controller.abort(reason)
  })
}

// Whoever read our output has gone: end as a program does that SIGPIPE ends.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  controller.abort(error.code === 'EPIPE' ? new Interrupted('SIGPIPE') : error)
})
process.stderr.on('error', () => {})

process.exit(await main(process.argv.slice(2)))

async function main(argv: readonly string[]): Promise<number> {
  let result: number = status.ok
  const program = createProgram(context, (value) => {
    result = value
  })
  try {
    await program.parseAsync(argv, { from: 'user' })
    await flushed(process.stdout)
    controller.signal.throwIfAborted()
    return result
  } catch (error) {
    return fail(error instanceof CommanderError ? usageError(error, program, argv) : error)
  }
}

async function fail(error: unknown): Promise<number> {
  const cause = controller.signal.aborted ? controller.signal.reason : error
  if (cause === undefined) {
    await flushed(process.stdout)
    return status.ok
  }
  if (cause instanceof Interrupted) return cause.status
  printError(cause, context)
  await flushed(process.stderr)
  return status.error
}

/** Waits until all that was written has gone on its way: process.exit does not. */
async function flushed(stream: NodeJS.WriteStream): Promise<void> {
  if (stream.destroyed) return
  await new Promise<void>((resolve) => {
    stream.once('close', resolve)
    stream.write('', () => resolve())
  })
}

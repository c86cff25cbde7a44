#!/usr/bin/env node
/** The command `skep`. */
import { CommanderError } from 'commander'
import { type Context, Interrupted, OutputError, printError, status } from './context.js'
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
  const gone = error.code === 'EPIPE'
  controller.abort(
    gone ? new Interrupted('SIGPIPE') : new OutputError(`cannot write to standard output: ${error.message}`),
  )
})
process.stderr.on('error', () => {})

process.exit(await main(process.argv.slice(2)))

async function main(argv: readonly string[]): Promise<number> {
  let result: number = status.ok
  const program = createProgram(context, (value) => {
    result = value
  })
  let error: unknown
  try {
    await program.parseAsync(argv, { from: 'user' })
  } catch (thrown) {
    // commander ends by an error after printing help, too.
    error = thrown instanceof CommanderError ? usageError(thrown, program, argv) : thrown
  }
  await flushed(process.stdout)
  // Why we were asked to end explains whatever went wrong after that.
  if (controller.signal.aborted) error = controller.signal.reason
  if (error === undefined) return result
  if (error instanceof Interrupted) return error.status
  printError(error, context)
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

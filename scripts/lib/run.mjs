// Running other programs: output goes to a log file and, line by line, to the step that waits; on failure the end of
// it is shown. Signals that end us end them.
import { spawn } from 'node:child_process'
import { createWriteStream, mkdirSync } from 'node:fs'
import { constants } from 'node:os'
import { join } from 'node:path'
import { logs, root } from './paths.mjs'
import { plain } from './progress.mjs'

const TAIL = 60

/** A failure that a person has been told enough about: no stack trace. */
export class Failure extends Error {
  /** @param {string} message @param {number} status exit status of the script */
  constructor(message, status = 1) {
    super(message)
    this.status = status
  }
}

const children = new Set()
let interrupted

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
  process.on(signal, () => {
    interrupted ??= signal
    if (children.size === 0) process.exit(128 + constants.signals[signal])
    for (const child of children) child.kill(signal)
  })
}

/**
 * Runs a program to its end.
 * @param {string} command
 * @param {string[]} args
 * @param {object} [options]
 * @param {string} [options.log] name of the log file; without it nothing is kept
 * @param {import('./progress.mjs').Step} [options.step] the step to tell
 * @param {(pid: number) => void} [options.onSpawn] is told its process
 * @param {(line: string) => boolean} [options.milestone] which lines stay on the screen
 * @param {(line: string) => void} [options.onLine] every line of both streams
 * @param {NodeJS.ProcessEnv} [options.env] additions to the environment
 * @param {boolean} [options.allowFailure] return the status instead of throwing
 * @param {AbortSignal} [options.signal] kills it; the abort is thrown
 * @returns {Promise<number>} exit status, 128 + n for a signal
 */
export async function run(command, args, options = {}) {
  const { log, step, milestone, onLine, onSpawn, env, signal, allowFailure = false } = options
  let file
  if (log) {
    mkdirSync(logs, { recursive: true })
    file = createWriteStream(join(logs, `${log}.log`))
    file.write(`$ ${command} ${args.join(' ')}\n`)
  }
  const tail = []
  const child = spawn(command, args, {
    cwd: root,
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, ...env },
    signal,
    killSignal: 'SIGKILL',
  })
  children.add(child)
  if (child.pid !== undefined) onSpawn?.(child.pid)
  for (const stream of [child.stdout, child.stderr]) {
    let rest = ''
    stream.setEncoding('utf8')
    stream.on('data', (chunk) => {
      file?.write(chunk)
      const lines = (rest + chunk).split(/\r?\n|\r/)
      rest = lines.pop() ?? ''
      for (const line of lines) take(line)
    })
    stream.on('end', () => rest && take(rest))
  }
  function take(line) {
    tail.push(line)
    if (tail.length > TAIL) tail.shift()
    onLine?.(line)
    step?.note(line, { milestone: milestone?.(plain(line)) ?? false })
  }
  const status = await ended(child).finally(() => {
    children.delete(child)
    file?.end()
  })
  if (interrupted) process.exit(128 + constants.signals[interrupted])
  if (status !== 0 && !allowFailure) {
    const where = log ? `; the whole output is in ${join(logs, `${log}.log`)}` : ''
    throw new Failure(`${tail.join('\n')}\n\n${command} ${args.join(' ')} ended with status ${status}${where}`)
  }
  return status
}

/** Runs a program that has our terminal to itself; its exit status, 128 + n for a signal. */
export async function runAttached(command, args) {
  const child = spawn(command, args, { cwd: root, stdio: 'inherit' })
  children.add(child)
  return await ended(child).finally(() => children.delete(child))
}

function ended(child) {
  return new Promise((resolve, reject) => {
    child.once('error', reject)
    child.once('close', (code, signal) => resolve(code ?? 128 + constants.signals[signal]))
  })
}

/** Output of a program, or undefined where it is missing or fails. */
export function output(command, args) {
  return new Promise((resolve) => {
    const child = spawn(command, args, { cwd: root, stdio: ['ignore', 'pipe', 'ignore'] })
    let text = ''
    child.stdout.setEncoding('utf8').on('data', (chunk) => {
      text += chunk
    })
    child.once('error', () => resolve(undefined))
    child.once('close', (code) => resolve(code === 0 ? text.trim() : undefined))
  })
}

/** Runs a script's main function and turns its failures into a message and an exit status. */
export async function main(body) {
  try {
    process.exitCode = (await body()) ?? 0
  } catch (error) {
    process.stderr.write(`\n${error instanceof Failure ? error.message : (error?.stack ?? error)}\n`)
    process.exitCode = error instanceof Failure ? error.status : 1
  }
}

/**
 * `skep` as a person runs it: a process of its own, with files and signals.
 *
 * @module
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { patience } from './accel.js'

/** The command, as package.json's `bin` names it. */
export const SKEP = fileURLToPath(new URL('../../dist/cli/main.js', import.meta.url))

/** How a run of the command ended. */
export interface CliResult {
  /** Exit status as a shell shows it: 128 + n if signal n ended it. */
  status: number
  stdout: string
  stderr: string
}

const SIGNALS: Record<string, number> = { SIGHUP: 1, SIGINT: 2, SIGKILL: 9, SIGTERM: 15 }

/** Options of {@link start}. */
export interface CliOptions {
  /** Put in front of `node`, such as `setpriv`. */
  wrapper?: string[]
  env?: NodeJS.ProcessEnv
  /** Milliseconds after which it is killed and the test fails. */
  timeout?: number
}

/** A run of the command that has not ended. */
export interface Running {
  child: ChildProcess
  /** Ends with the process. */
  result: Promise<CliResult>
  /** Resolves when `text` has been on stdout. */
  saw(text: string | RegExp): Promise<void>
}

/** Starts `skep` with `args`. */
export function start(
  args: string[],
  { wrapper = [], env = {}, timeout = 120_000 * patience }: CliOptions = {},
): Running {
  const [command = process.execPath, ...rest] = [...wrapper, process.execPath, SKEP, ...args]
  const child = spawn(command, rest, {
    stdio: ['pipe', 'pipe', 'pipe'],
    env: { ...process.env, NO_COLOR: '1', ...env },
  })
  const waiting: { text: string | RegExp; seen: () => void; failed: (error: Error) => void }[] = []
  let stdout = ''
  let stderr = ''
  child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
    stdout += chunk
    for (const one of waiting) if (found(one.text)) one.seen()
  })
  child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
    stderr += chunk
  })
  const found = (text: string | RegExp) => (typeof text === 'string' ? stdout.includes(text) : text.test(stdout))
  const result = new Promise<CliResult>((resolve, reject) => {
    const timer = setTimeout(() => {
      child.kill('SIGKILL')
      reject(new Error(`skep ${args.join(' ')} still ran after ${timeout} ms:\n${stdout}\n${stderr}`))
    }, timeout)
    child.once('error', reject)
    child.once('close', (code, signal) => {
      clearTimeout(timer)
      for (const one of waiting) one.failed(new Error(`it ended before ${one.text} was seen:\n${stdout}\n${stderr}`))
      resolve({ status: code ?? 128 + (SIGNALS[signal ?? ''] ?? 0), stdout, stderr })
    })
  })
  result.catch(() => {})
  return {
    child,
    result,
    saw: (text) =>
      new Promise((seen, failed) => {
        if (found(text)) seen()
        else waiting.push({ text, seen, failed })
      }),
  }
}

/** Runs `skep` to its end. */
export function skep(args: string[], options?: CliOptions): Promise<CliResult> {
  const { child, result } = start(args, options)
  child.stdin?.end()
  return result
}

/** A folder of one's own that is gone afterwards. */
export class Folder implements AsyncDisposable {
  private constructor(readonly path: string) {}

  static async make(): Promise<Folder> {
    return new Folder(await mkdtemp(join(tmpdir(), 'skep-test-')))
  }

  /** A path in it. */
  file(name: string): string {
    return join(this.path, name)
  }

  /** Names of what is in it. */
  list(): Promise<string[]> {
    return readdir(this.path)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await rm(this.path, { recursive: true, force: true })
  }
}

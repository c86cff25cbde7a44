/** Running the tools of the host that images are made with. */
import { type ChildProcess, spawn } from 'node:child_process'
import { ImageError } from '../errors.js'

/** How a tool is run. */
export interface ToolOptions {
  signal?: AbortSignal | undefined
  /** Folder to run in. */
  cwd?: string | undefined
  /** Is given each line of what the tool prints, on either stream. */
  onLine?: ((line: string) => void) | undefined
}

/** What a tool said. */
export interface ToolResult {
  status: number
  stdout: string
  stderr: string
}

/** Most output that is kept of one tool, in characters. */
const maxOutput = 16 * 1024 * 1024

/** Debian packages of the tools, for who has not got them. */
const packages: Readonly<Record<string, string>> = {
  'apt-get': 'apt',
  'apt-cache': 'apt',
  'dpkg-deb': 'dpkg',
  tar: 'tar',
  xz: 'xz-utils',
  zstd: 'zstd',
}

/**
 * Runs a tool to its end.
 *
 * @throws ImageError `ERR_IMAGE_TOOL` if it is not installed, naming the package.
 */
export async function runTool(tool: string, args: readonly string[], options: ToolOptions = {}): Promise<ToolResult> {
  const { signal, cwd, onLine } = options
  signal?.throwIfAborted()
  const child = spawn(tool, args, { cwd, env: environment(), stdio: ['ignore', 'pipe', 'pipe'] })
  const stdout = collect(child.stdout, onLine)
  const stderr = collect(child.stderr, onLine)
  const status = await ended(tool, child, signal)
  return { status, stdout: stdout(), stderr: stderr() }
}

/** Pipes what `from` prints into `to`; what failed is told by its name. */
export async function pipeTools(
  from: readonly [string, ...string[]],
  to: readonly [string, ...string[]],
  options: ToolOptions = {},
): Promise<void> {
  const { signal, cwd } = options
  signal?.throwIfAborted()
  const [source, ...sourceArgs] = from
  const [sink, ...sinkArgs] = to
  const first = spawn(source, sourceArgs, { cwd, env: environment(), stdio: ['ignore', 'pipe', 'pipe'] })
  const second = spawn(sink, sinkArgs, { cwd, env: environment(), stdio: ['pipe', 'ignore', 'pipe'] })
  const errors = [collect(first.stderr), collect(second.stderr)]
  // When the reader ends early the writer gets EPIPE; its status says so, the stream need not.
  second.stdin.on('error', () => {})
  first.stdout.pipe(second.stdin)
  const results = await Promise.allSettled([ended(source, first, signal), ended(sink, second, signal)])
  for (const [index, result] of results.entries()) {
    if (result.status === 'rejected') throw result.reason
    if (result.value !== 0) {
      const [tool] = index === 0 ? from : to
      throw toolFailure(tool, { status: result.value, stdout: '', stderr: errors[index]?.() ?? '' })
    }
  }
}

/** The error for a tool that ended badly: what it said, sorted by what it means. */
export function toolFailure(tool: string, result: ToolResult): ImageError {
  const said = `${result.stderr}\n${result.stdout}`
  const complaint = complaints(said)
  const text = complaint === '' ? `status ${result.status}` : complaint
  const details = { tool, status: result.status, output: said.trim().slice(-4096) }
  if (/no space left|disk quota exceeded|read-only file system|not have enough free space/i.test(said)) {
    return new ImageError('ERR_IMAGE_DISK', `${tool}: ${text}; make room, or set XDG_CACHE_HOME`, { details })
  }
  if (/could not resolve|temporary failure|connection|timed out|failed to fetch|unable to fetch|network/i.test(said)) {
    return new ImageError('ERR_IMAGE_NETWORK', `${tool}: ${text}; check the network and apt's proxy settings`, {
      details,
    })
  }
  if (/unable to locate package|no packages found|has no installation candidate|can't find a source/i.test(said)) {
    return new ImageError('ERR_IMAGE_PACKAGE', `${tool}: ${text}; add a Debian source to apt`, { details })
  }
  return new ImageError('ERR_IMAGE_BUILD', `${tool} failed: ${text}`, { details })
}

function complaints(said: string): string {
  const lines = said.split('\n').filter((line) => /^(E|Err|W|.*error|.*: cannot|.*failed)\b/i.test(line.trim()))
  const errors = lines.filter((line) => line.startsWith('E:'))
  const chosen = (errors.length > 0 ? errors : lines).map((line) => line.trim().replace(/^[EW]: /, ''))
  return [...new Set(chosen)].slice(0, 3).join('; ')
}

/** What tools print must not depend on the user's language. */
function environment(): NodeJS.ProcessEnv {
  return { ...process.env, LC_ALL: 'C', DEBIAN_FRONTEND: 'noninteractive' }
}

function collect(stream: NodeJS.ReadableStream | null, onLine?: (line: string) => void): () => string {
  let text = ''
  let rest = ''
  stream?.setEncoding('utf8')
  stream?.on('data', (chunk: string) => {
    text = (text + chunk).slice(-maxOutput)
    if (!onLine) return
    const lines = (rest + chunk).split(/[\r\n]+/)
    rest = lines.pop() ?? ''
    for (const line of lines) if (line.trim() !== '') onLine(line.trim())
  })
  return () => text
}

async function ended(tool: string, child: ChildProcess, signal: AbortSignal | undefined): Promise<number> {
  const stop = (): void => {
    child.kill('SIGTERM')
  }
  signal?.addEventListener('abort', stop, { once: true })
  try {
    const status = await new Promise<number>((done, fail) => {
      child.once('error', fail)
      child.once('close', (code) => done(code ?? 1))
    })
    signal?.throwIfAborted()
    return status
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code !== 'ENOENT') throw cause
    const name = packages[tool] ?? tool
    throw new ImageError('ERR_IMAGE_TOOL', `${tool} is not installed; it is in Debian's package ${name}`, {
      cause,
      details: { tool, package: name },
    })
  } finally {
    signal?.removeEventListener('abort', stop)
  }
}

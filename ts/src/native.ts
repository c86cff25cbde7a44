/**
 * The addon: its surface, and how it is found. No other module touches it.
 *
 * @module
 */
import { existsSync, readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { fileURLToPath } from 'node:url'
import { fromNative, NativeBindingError, type SkepError } from './errors.js'

/** A machine, as the addon has it. Every failing call has an error whose message is JSON, see {@link fromNative}. */
export interface NativeMachine {
  start(): Promise<void>
  pause(): Promise<void>
  resume(): Promise<void>
  reset(): Promise<void>
  powerButton(): Promise<void>
  kill(): Promise<void>
  state(): string
  /** JSON. */
  stats(): Promise<string>
  /** JSON: an object of hexadecimal strings. */
  registers(vcpu: number): Promise<string>
  setRegisters(vcpu: number, json: string): Promise<void>
  readMemory(gpa: bigint, length: number): Promise<Buffer>
  writeMemory(gpa: bigint, data: Buffer): Promise<void>
  /** Hands input to a console; the number of bytes taken. When it takes fewer than all, a `console-drain` event follows. */
  consoleWrite(port: number, data: Buffer): number
  /** Says that `bytes` of a console's output have been dealt with. */
  consoleCredit(port: number, bytes: number): void
  ref(): void
  unref(): void
  destroy(): Promise<void>
}

/** The surface of the addon. */
export interface Native {
  readonly Machine: {
    create(
      spec: string,
      onEvent: (events: string) => void,
      onConsole: (port: number, data: Buffer) => void,
    ): Promise<NativeMachine>
  }
  /** JSON, see `Probe` in `doctor.ts`. */
  probe(): string
  /** JSON: the parts `kvm` and `accelerator` of the same. */
  accelerator(): string
}

/** Bytes that the addon sends beyond what has been credited, for each console. */
export const consoleWindow: number = 256 * 1024

let loaded: Native | undefined

/**
 * The addon, loaded at the first call.
 *
 * @throws NativeBindingError if it is missing or cannot be loaded; the message names the package and the remedy.
 */
export function native(): Native {
  loaded ??= load()
  return loaded
}

/** Runs a call of the addon and gives its errors their classes. */
export async function crossing<T>(call: () => Promise<T>): Promise<T> {
  try {
    return await call()
  } catch (error) {
    throw fromNative(error)
  }
}

/** The same for calls that answer at once. */
export function crossingSync<T>(call: () => T): T {
  try {
    return call()
  } catch (error) {
    throw fromNative(error)
  }
}

function load(): Native {
  const require = createRequire(import.meta.url)
  const triple = platformTriple()
  const name = `skep.${triple}.node`
  // Beside the compiled JavaScript, and, when the sources run as they are, where the build puts it.
  const builds = ['./native/', '../../dist/native/'].map((folder) =>
    fileURLToPath(new URL(folder + name, import.meta.url)),
  )
  const override = process.env['SKEP_NATIVE_LIBRARY']
  const file = override ?? builds.find((build) => existsSync(build))
  if (file !== undefined) return open(require, file)
  const packageName = `skep-${triple}`
  try {
    require.resolve(packageName)
  } catch (cause) {
    throw new NativeBindingError('ERR_NATIVE_MISSING', missing(packageName), {
      cause,
      details: { packageName, builds },
    })
  }
  return open(require, packageName)
}

function open(require: NodeJS.Require, file: string): Native {
  try {
    return require(file) as Native
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause)
    throw new NativeBindingError('ERR_NATIVE_LOAD', `cannot load the addon ${file}: ${reason}`, {
      cause,
      details: { file },
    })
  }
}

function missing(packageName: string): string {
  return (
    `the compiled part of skep is missing: package ${packageName} is not installed. ` +
    'Install skep again without --omit=optional (npm before 11.3 can lose optional packages: remove node_modules and ' +
    'package-lock.json first); in a checkout, npm run build:native builds it'
  )
}

function platformTriple(): string {
  const { platform, arch } = process
  if (platform !== 'linux' || arch !== 'x64') {
    const message = `skep runs on Linux on x86-64, this is ${platform} on ${arch}`
    const error: SkepError = new NativeBindingError('ERR_NATIVE_MISSING', message, { details: { platform, arch } })
    throw error
  }
  return `linux-x64-${isMusl() ? 'musl' : 'gnu'}`
}

/** Whether this Node runs on musl: its loader is mapped. The report, which takes far longer to make, names glibc's version. */
function isMusl(): boolean {
  const maps = readFileSync('/proc/self/maps', 'latin1')
  if (maps.includes('/ld-musl-')) return true
  if (maps.includes('/libc.so.6')) return false
  const report = process.report?.getReport() as { header?: { glibcVersionRuntime?: string } } | undefined
  return report?.header?.glibcVersionRuntime === undefined
}

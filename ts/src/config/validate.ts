/** From unknown values to configurations, or to errors that help. */
import type { z } from 'zod'
import { ConfigError, type ConfigIssue } from '../errors.js'
import { parseSlot } from '../pci/slot.js'
import { derivedFlags } from './cpu.js'
import { childrenOf, configOptions, unsupportedDevices, unsupportedOptions } from './options.js'
import { vmConfigSchema } from './schema.js'
import { didYouMean } from './suggest.js'
import type { VmConfig } from './types.js'

type Issue = z.core.$ZodIssue
type Key = PropertyKey

/**
 * Checks that `value` is a configuration.
 *
 * @throws ConfigError that lists everything that is wrong.
 */
export function validate(value: unknown): VmConfig {
  const result = vmConfigSchema.safeParse(withoutSchemaHint(value))
  if (result.success) return result.data
  const issues = result.error.issues.flatMap((issue) => explain(issue, value, []))
  // Misspelt names first: what is missing is often what was misspelt.
  issues.sort((a, b) => rank(a) - rank(b))
  const [first, ...rest] = issues
  throw ConfigError.from([first ?? issueAt([], value), ...rest])
}

function rank(issue: ConfigIssue): number {
  return issue.code === 'ERR_CONFIG_UNKNOWN' ? 0 : issue.code === 'ERR_CONFIG_MISSING' ? 2 : 1
}

function withoutSchemaHint(value: unknown): unknown {
  if (typeof value !== 'object' || value === null || !Object.hasOwn(value, '$schema')) return value
  const { $schema: _, ...rest } = value as Record<string, unknown>
  return rest
}

/** How a path is written in errors: `devices["0:31:0"].com1`, `boot.modules[0].path`. */
export function formatPath(path: readonly Key[]): string {
  return path
    .map((key, index) => {
      if (typeof key === 'number') return `[${key}]`
      const name = String(key)
      if (!/^[\w$]+$/.test(name)) return `[${JSON.stringify(name)}]`
      return index === 0 ? name : `.${name}`
    })
    .join('')
}

function explain(issue: Issue, root: unknown, above: readonly Key[]): ConfigIssue[] {
  const path = [...above, ...issue.path]
  if (issue.code === 'unrecognized_keys') return issue.keys.map((key) => unknown(path, key, valueAt(root, path)))
  if (issue.code === 'invalid_union') {
    const branch = meantBranch(issue.errors)
    if (branch) return branch.flatMap((inner) => explain(inner, root, path))
  }
  return [issueAt(path, valueAt(root, path))]
}

/** The alternative of a union that was meant: of those whose type fits, the one with the least to complain about. */
function meantBranch(branches: readonly Issue[][]): readonly Issue[] | undefined {
  const fitting = branches.filter((issues) => issues.every((issue) => issue.path.length > 0 || !isTypeIssue(issue)))
  const cost = (issues: readonly Issue[]): number =>
    issues.reduce((sum, issue) => sum + (issue.path.at(-1) === 'kind' ? 8 : 1), 0)
  return fitting.sort((a, b) => cost(a) - cost(b))[0]
}

function isTypeIssue(issue: Issue): boolean {
  if (issue.code === 'invalid_union') return meantBranch(issue.errors) === undefined
  return issue.code === 'invalid_type' || issue.code === 'invalid_value' || issue.code === 'invalid_format'
}

function valueAt(root: unknown, path: readonly Key[]): unknown {
  let value = root
  for (const key of path) {
    if (typeof value !== 'object' || value === null) return undefined
    value = (value as Record<Key, unknown>)[key]
  }
  return value
}

function unknown(path: readonly Key[], key: string, parent: unknown): ConfigIssue {
  const full = formatPath([...path, key])
  const at = formatPath(path)
  const value = valueAt(parent, [key])
  if (at === 'devices') return unknownSlot(full, key, value)
  const part = unsupportedOptions.get(full)
  if (part !== undefined) {
    return { code: 'ERR_CONFIG_UNSUPPORTED', path: full, message: `${full}: this version of skep has no ${part} yet` }
  }
  if (at === 'boot' && (key === 'rom' || key === 'kernel')) {
    return { code: 'ERR_CONFIG_INVALID', path: full, message: 'boot: give either kernel or rom, not both' }
  }
  const source = at === 'cpu.features' ? derivedFlags.get(key) : undefined
  if (source !== undefined) {
    return { code: 'ERR_CONFIG_CPU', path: full, message: `${full}: ${key} is no feature of its own: ${source}` }
  }
  const message = `unknown option "${full}"${didYouMean(key, childrenOf(generic(path)))}`
  return { code: 'ERR_CONFIG_UNKNOWN', path: full, message }
}

function unknownSlot(path: string, key: string, value: unknown): ConfigIssue {
  const slot = parseSlot(key)
  if (slot === undefined) {
    return {
      code: 'ERR_CONFIG_SLOT',
      path,
      message: `${path}: ${show(key)} is not a slot; slots are bus:device:function, such as "0:31:0"`,
    }
  }
  const type = valueAt(value, ['type'])
  if (slot === '0:31:0') {
    return { code: 'ERR_CONFIG_SLOT', path, message: `${path}: write the slot in full, "0:31:0"` }
  }
  if (type === 'lpc') {
    return { code: 'ERR_CONFIG_SLOT', path, message: `${path}: the lpc bridge sits in slot "0:31:0", nowhere else` }
  }
  const name = typeof type === 'string' ? type : 'a device there'
  return {
    code: 'ERR_CONFIG_UNSUPPORTED',
    path,
    message: `${path}: this version of skep has no ${name} yet; the only device is lpc, in slot "0:31:0"`,
  }
}

function generic(path: readonly Key[]): string {
  const full = formatPath(path)
  // What is pinned is known by its number, and has no entry of its own.
  return full.startsWith('cpus.pin') ? 'cpus.pin' : full.replace(/\[\d+\]/g, '[]')
}

function issueAt(keys: readonly Key[], value: unknown): ConfigIssue {
  const path = formatPath(keys)
  const option = configOptions.get(generic(keys))
  const expects = option?.expects ?? 'another value'
  const subject = path === '' ? 'the configuration' : path
  if (value === undefined) {
    return { code: 'ERR_CONFIG_MISSING', path, message: `${subject} is missing; expected ${expects}` }
  }
  if (path === 'devices["0:31:0"].type' && typeof value === 'string' && unsupportedDevices.has(value)) {
    return {
      code: 'ERR_CONFIG_UNSUPPORTED',
      path,
      message: `${path}: this version of skep has no ${value} yet; slot "0:31:0" holds the lpc bridge`,
    }
  }
  return { code: codeFor(path), path, message: `${subject}: expected ${expects}, got ${show(value)}` }
}

function codeFor(path: string): ConfigIssue['code'] {
  if (path === 'version') return 'ERR_CONFIG_VERSION'
  if (path === 'engine') return 'ERR_CONFIG_ENGINE'
  if (/^cpus\b/.test(path)) return 'ERR_CONFIG_CPUS'
  if (/^cpu\b/.test(path)) return 'ERR_CONFIG_CPU'
  if (/^memory\b/.test(path)) return 'ERR_CONFIG_MEMORY'
  if (/^devices.*\.com\d/.test(path)) return 'ERR_CONFIG_SERIAL'
  if (/^devices\b/.test(path)) return 'ERR_CONFIG_SLOT'
  return 'ERR_CONFIG_INVALID'
}

/** A value, short enough for a message. */
export function show(value: unknown): string {
  if (Array.isArray(value)) return 'an array'
  if (typeof value === 'object' && value !== null) return 'an object'
  if (typeof value === 'function') return 'a function'
  if (typeof value === 'bigint') return `${value}n`
  if (typeof value !== 'string') return String(value)
  return JSON.stringify(value.length > 60 ? `${value.slice(0, 60)}…` : value)
}

import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import * as errors from '../../ts/src/errors.js'

const { errorTable, errorOf, fromNative, isSkepError, SkepError } = errors
const root = new URL('../../', import.meta.url).pathname
const codes = Object.keys(errorTable) as errors.ErrorCode[]

function sources(folder: string, extension: string): string[] {
  return readdirSync(join(root, folder), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && entry.name.endsWith(extension))
    .map((entry) => readFileSync(join(entry.parentPath, entry.name), 'utf8'))
}

describe('the table of errors', () => {
  test.each(codes)('%s makes an error of its class, with a remedy', (code) => {
    const error = errorOf(code, 'what')
    expect(error).toBeInstanceOf(SkepError)
    // biome-ignore lint/performance/noDynamicNamespaceImportAccess: the table names the class
    expect(error).toBeInstanceOf(errors[errorTable[code].class])
    expect(error.name).toBe(errorTable[code].class)
    expect(error.code).toBe(code)
    expect(error.remedy).toMatch(/\.$/)
    expect(errorTable[code].meaning).toMatch(/\.$/)
    expect(Object.keys(error)).not.toContain('name')
    expect(isSkepError(error, code)).toBe(true)
    expect(isSkepError(new Error('x'))).toBe(false)
  })

  test('has every code that the engine can give', () => {
    // Codes are literals in Rust; some are put together of a prefix ("ERR_KERNEL_") and an ending.
    const literals = new Set(sources('crates', '.rs').flatMap((text) => text.match(/\bERR_[A-Z][A-Z0-9_]+\b/g) ?? []))
    const whole = [...literals].filter((code) => !code.endsWith('_'))
    expect(whole.length).toBeGreaterThan(10)
    expect(whole.filter((code) => !Object.hasOwn(errorTable, code))).toEqual([])
  })

  test('has no code that nothing gives', () => {
    const text = [...sources('crates', '.rs'), ...sources('ts/src', '.ts')].join('\n')
    const given = (code: string) => (text.match(new RegExp(`\\b${code}\\b`, 'g'))?.length ?? 0) > 1
    // The engine makes these of the kind of file and the fault.
    const made = (code: string) => {
      const fault = /^ERR_(?:KERNEL|INITRD|ROM|MODULE)_(\w+)$/.exec(code)?.[1]
      return fault !== undefined && text.includes(`, "${fault}")`)
    }
    expect(codes.filter((code) => !given(code) && !made(code))).toEqual([])
  })

  test('is what docs/errors.md says', async () => {
    // Written anew by: npx vitest run --project unit -u errors
    await expect(page()).toMatchFileSnapshot(join(root, 'docs/errors.md'))
  })
})

function page(): string {
  const classes = [...new Set(codes.map((code) => errorTable[code].class))]
  const rows = (name: errors.ErrorClass) =>
    codes
      .filter((code) => errorTable[code].class === name)
      .map((code) => `| \`${code}\` | ${errorTable[code].meaning} | ${errorTable[code].remedy} |`)
  return `# Errors

Everything that can go wrong is an error of a class that extends \`SkepError\`, with a \`code\` that does not change, a \`path\`
where a place in the configuration is to blame, and \`details\` for programs. The message says what is wrong, where, and what
would be right; \`remedy\` is the last column below. The end of a guest is not among them: that is data, \`vm.exited\`.

\`\`\`ts
try {
  await Vm.create(config)
} catch (error) {
  if (isSkepError(error, 'ERR_MEMORY_HOST')) console.error(error.message, error.remedy, error.details.size)
  else throw error
}
\`\`\`

What else they carry: \`ConfigError.issues\` lists everything that is wrong with a configuration, not only the first thing;
\`BootError.output\` and \`ConsoleError.output\` are the last of the serial output. Whatever is broken off by an \`AbortSignal\` is
rejected with the signal's own reason. \`skep\` prints errors on standard error with their code, and exits with status 4.

This page is written from the table in \`ts/src/errors.ts\`.
${classes.map((name) => `\n## ${name}\n\n| code | meaning | remedy |\n|---|---|---|\n${rows(name).join('\n')}\n`).join('')}`
}

describe('errors of the addon', () => {
  test('get their class, path and details', () => {
    const thrown = new Error(
      JSON.stringify({ code: 'ERR_VM_STATE', message: 'no', path: 'a.b', details: { state: 'paused' } }),
    )
    const error = fromNative(thrown)
    expect(error).toBeInstanceOf(errors.StateError)
    expect(error).toMatchObject({ code: 'ERR_VM_STATE', message: 'no', path: 'a.b', details: { state: 'paused' } })
  })

  test.each([
    'not JSON',
    '{}',
    '[]',
    'null',
    '{"code":5,"message":"x"}',
    '{"code":"ERR_NEW","message":"x"}',
    '{"code":"toString","message":"x"}',
  ])('that are none (%s) are defects, and say what they were', (text) => {
    const error = fromNative(new Error(text))
    expect(error).toBeInstanceOf(errors.InternalError)
    expect(error.message).toContain(text.includes('"message":"x"') && !text.includes(':5') ? 'x' : text)
  })

  test('pass through when they are ours already', () => {
    const error = errorOf('ERR_VM_STATE', 'x')
    expect(fromNative(error)).toBe(error)
  })
})

describe('an error of a configuration', () => {
  test('is its first issue, and lists all', () => {
    const issues = [
      { code: 'ERR_CONFIG_CPUS', path: 'cpus', message: 'a' },
      { code: 'ERR_CONFIG_MEMORY', path: 'memory', message: 'b' },
    ] as const
    expect(errors.ConfigError.from([...issues])).toMatchObject({ ...issues[0], issues })
    expect(new errors.ConfigError('ERR_CONFIG_CPUS', 'a', { path: 'cpus' }).issues).toEqual([issues[0]])
  })
})

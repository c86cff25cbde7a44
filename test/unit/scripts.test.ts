// What the scripts conclude from other programs' output, and which licences they let in.
import { execFile } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { describe, expect, test } from 'vitest'
// @ts-expect-error plain JavaScript, since it runs before anything is built
import { satisfies } from '../../scripts/lib/licences.mjs'
// @ts-expect-error
import { lines } from '../../scripts/lib/lines.mjs'
// @ts-expect-error
import { markers, script } from '../../scripts/lib/suite.mjs'
// @ts-expect-error
import { libtestResult, Totals, vitestResult } from '../../scripts/lib/totals.mjs'

describe('totals', () => {
  test('of a test binary are read from its last line', () => {
    const line = 'test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s'
    expect(libtestResult(line)).toEqual({ passed: 12, failed: 3, skipped: 1 })
    expect(libtestResult('test spec::tests::garbage_never_panics ... ok')).toBeUndefined()
  })

  test('of vitest count a file that does not load as a failure', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'skep-test-'))
    try {
      const path = join(folder, 'report.json')
      const testResults = [
        { status: 'passed', assertionResults: [{ status: 'passed' }] },
        { status: 'failed', assertionResults: [{ status: 'failed' }] },
        { status: 'failed', assertionResults: [] },
      ]
      await writeFile(path, JSON.stringify({ numPassedTests: 1, numFailedTests: 1, numPendingTests: 2, testResults }))
      expect(vitestResult(path)).toEqual({ passed: 1, failed: 2, skipped: 2 })
    } finally {
      await rm(folder, { recursive: true })
    }
  })

  test('add up to one line', () => {
    const totals = new Totals()
    totals.add({ passed: 2, skipped: 1 })
    totals.add({ passed: 3, failed: 1 })
    expect(String(totals)).toBe('5 passed, 1 failed, 1 skipped')
  })
})

describe('commands in one script', () => {
  const sh = (text: string) => ({ args: ['sh', '-c', text], cwd: '/' })

  test('are told apart, with their exit statuses, whatever they print', async () => {
    const commands = [
      { args: ['sh', '-c', 'printf "$WORD; no end of line"; pwd >&2'], cwd: '/usr', env: { WORD: "it's" } },
      sh('exit 3'),
      sh('kill -9 $$'),
    ]
    const { stdout } = await promisify(execFile)('sh', ['-c', script(commands)])
    const marks = markers()
    const rest: string[] = []
    const take = lines((line: string) => {
      if (!marks.take(line)) rest.push(line)
    })
    // In pieces that end anywhere.
    for (const byte of Buffer.from(stdout)) take(Buffer.of(byte))
    expect(marks.statuses).toEqual([0, 3, 137])
    expect(rest).toContain("it's; no end of line/usr")
  })

  test('that cannot even start have a status', async () => {
    const commands = [{ args: ['true'], cwd: '/no such folder' }, sh('exit 0')]
    const { stdout } = await promisify(execFile)('sh', ['-c', script(commands)])
    const marks = markers()
    const take = lines((line: string) => marks.take(line))
    take(Buffer.from(stdout))
    const [first, second] = marks.statuses
    expect(first).not.toBe(0)
    expect(second).toBe(0)
  })
})

describe('a licence expression', () => {
  const allowed = new Set(['MIT', 'Apache-2.0', 'Apache-2.0 WITH LLVM-exception', 'Unicode-3.0'])

  test.each<[string, boolean]>([
    ['MIT', true],
    ['GPL-3.0', false],
    ['GPL-3.0 OR MIT', true],
    ['MIT/Apache-2.0', true],
    ['MIT AND GPL-3.0', false],
    ['(MIT OR GPL-3.0) AND Unicode-3.0', true],
    ['MIT OR GPL-3.0 AND GPL-2.0', true],
    ['(GPL-3.0 OR GPL-2.0) AND MIT', false],
    ['Apache-2.0 WITH LLVM-exception', true],
    ['Apache-2.0 WITH other-exception', false],
    ['', false],
    ['MIT)', false],
    ['UNLICENSED', false],
  ])('%j: %s', (expression, is) => {
    expect(satisfies(expression, allowed)).toBe(is)
  })
})

// Results of different test runners, added up.
import { readFileSync } from 'node:fs'

/** Passed, failed and skipped tests. */
export class Totals {
  passed = 0
  failed = 0
  skipped = 0

  add({ passed = 0, failed = 0, skipped = 0 }) {
    this.passed += passed
    this.failed += failed
    this.skipped += skipped
  }

  toString() {
    return `${this.passed} passed, ${this.failed} failed, ${this.skipped} skipped`
  }
}

/** Reads a line that libtest prints at the end of each test binary; undefined for any other line. */
export function libtestResult(line) {
  const found = line.match(/^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored;/)
  if (!found) return undefined
  return { passed: Number(found[1]), failed: Number(found[2]), skipped: Number(found[3]) }
}

/** Reads vitest's JSON report. A file that could not even be loaded counts as one failure. */
export function vitestResult(path) {
  const report = JSON.parse(readFileSync(path, 'utf8'))
  const broken = report.testResults.filter(
    (file) => file.status === 'failed' && !file.assertionResults.some((test) => test.status === 'failed'),
  )
  return {
    passed: report.numPassedTests,
    failed: report.numFailedTests + broken.length,
    skipped: report.numPendingTests + (report.numTodoTests ?? 0),
  }
}

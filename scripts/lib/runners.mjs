// Which lines of the test runners a person wants to see while they run.

/** What libtest and the compiler say of a failure. */
export const isCargoFailure = (line) =>
  /^test .* FAILED$|^error(\[|:)|panicked at|^\s+left: |^\s+right: |^assertion /.test(line)

/** Results of vitest's tests or files, and where one failed. */
export const isVitestMilestone = (line) => /^\s?[✓↓] \||^\s*[✗×❯] |^\s*FAIL |Error: |^\s*at .*\.test\.ts/.test(line)

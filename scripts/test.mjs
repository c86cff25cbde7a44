// npm test: everything that can fail, from a bare checkout. `npm test -- cargo`, `-- unit`, `-- boot` run a part.
// SKEP_ENGINE=interpreter npm test runs the guests of the boot tests on that engine of the software CPU instead of the JIT.
// Ends with one line of totals on stdout; the exit status is non-zero if anything failed.
import { mkdirSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { build, isCompiling } from './lib/build.mjs'
import { bin, logs, state } from './lib/paths.mjs'
import { duration, step } from './lib/progress.mjs'
import { Failure, main, run } from './lib/run.mjs'
import { isCargoFailure, isVitestMilestone } from './lib/runners.mjs'
import { checkTools } from './lib/tools.mjs'
import { libtestResult, Totals, vitestResult } from './lib/totals.mjs'

const PARTS = ['cargo', 'unit', 'boot']

/** Every crate but the binding, which holds conversions only and whose symbols are Node's: vitest tests it. */
const CARGO = ['test', '--workspace', '--exclude', 'skep-node', '--no-fail-fast']

async function cargo(totals) {
  await step('cargo test', async (step) => {
    const part = new Totals()
    let results = 0
    const status = await run('cargo', CARGO, {
      log: 'cargo-test',
      step,
      allowFailure: true,
      milestone: (line) => isCompiling(line) || isCargoFailure(line),
      onLine: (line) => {
        const result = libtestResult(line)
        if (!result) return
        results += 1
        part.add(result)
      },
    })
    // Nothing ran, or something died without saying which test it was: that is a failure too.
    if (status !== 0 && part.failed === 0) part.add({ failed: 1 })
    if (status === 0 && results === 0) throw new Failure('cargo test ran, but printed no results')
    totals.add(part)
    return `${part}`
  })
}

/** Runs a vitest project; `reporter` decides whether every test is told or only every file. */
async function vitest(project, reporter, totals) {
  await step(`vitest ${project}`, async (step) => {
    const report = join(state, `vitest-${project}.json`)
    mkdirSync(state, { recursive: true })
    rmSync(report, { force: true })
    const status = await run(
      bin('vitest'),
      ['run', '--project', project, `--reporter=${reporter}`, '--reporter=json', `--outputFile.json=${report}`],
      { log: `vitest-${project}`, step, allowFailure: true, milestone: isVitestMilestone, env: { NO_COLOR: '1' } },
    )
    const part = new Totals()
    try {
      part.add(vitestResult(report))
    } catch (error) {
      if (status === 0) throw new Failure(`vitest ran, but its report cannot be read: ${error.message}`)
    }
    if (status !== 0 && part.failed === 0) part.add({ failed: 1 })
    totals.add(part)
    return `${part}`
  })
}

await main(async () => {
  const started = Date.now()
  const chosen = process.argv.slice(2)
  const unknown = chosen.filter((part) => !PARTS.includes(part))
  if (unknown.length > 0) throw new Failure(`unknown part ${unknown.join(', ')}; there are ${PARTS.join(', ')}`, 2)
  const wanted = (part) => chosen.length === 0 || chosen.includes(part)

  await checkTools({ guests: wanted('boot'), tests: true })
  await build()
  const totals = new Totals()
  if (wanted('cargo')) await cargo(totals)
  if (wanted('unit')) await vitest('unit', 'default', totals)
  if (wanted('boot')) await vitest('boot', 'verbose', totals)
  process.stderr.write(`\n${duration(Date.now() - started)} in all; full output of every step: ${logs}\n`)
  process.stdout.write(`${totals}\n`)
  return totals.failed > 0 ? 1 : 0
})

// npm run lint: formatting, lints, types and licences, without running anything. Warnings are errors. Goes on after a
// failure, so that one run shows them all.
import { build, isCompiling } from './lib/build.mjs'
import { bin } from './lib/paths.mjs'
import { step } from './lib/progress.mjs'
import { Failure, main, run } from './lib/run.mjs'
import { checkTools } from './lib/tools.mjs'

const CLIPPY = ['clippy', '--workspace', '--all-targets', '--', '-D', 'warnings']

const CHECKS = [
  ['cargo fmt', 'cargo', ['fmt', '--all', '--check']],
  ['cargo clippy', 'cargo', CLIPPY],
  ['biome', bin('biome'), ['check', '.']],
  ['types', 'npm', ['run', '--silent', 'typecheck']],
  ['licences', process.execPath, ['scripts/licences.mjs']],
]

await main(async () => {
  await checkTools({ tests: true })
  await build()
  const failures = []
  for (const [title, command, args] of CHECKS) {
    try {
      await step(title, (step) => run(command, args, { log: title.replace(' ', '-'), step, milestone: isCompiling }))
    } catch (error) {
      if (!(error instanceof Failure)) throw error
      failures.push(error.message)
    }
  }
  if (failures.length > 0) throw new Failure(failures.join('\n\n'))
})

// npm run lint: formatting, lints and types, without running anything. Warnings are errors.
import { build, isCompiling } from './lib/build.mjs'
import { bin } from './lib/paths.mjs'
import { step } from './lib/progress.mjs'
import { main, run } from './lib/run.mjs'
import { checkTools } from './lib/tools.mjs'

await main(async () => {
  await checkTools({ tests: true })
  await build()
  await step('cargo fmt --check', (step) => run('cargo', ['fmt', '--all', '--check'], { log: 'cargo-fmt', step }))
  await step('cargo clippy', (step) =>
    run('cargo', ['clippy', '--workspace', '--all-targets', '--', '-D', 'warnings'], {
      log: 'clippy',
      step,
      milestone: isCompiling,
    }),
  )
  await step('biome', (step) => run(bin('biome'), ['check', '.'], { log: 'biome', step }))
  await step('types', (step) => run('npm', ['run', '--silent', 'typecheck'], { log: 'typecheck', step }))
  await step('licences', (step) => run('node', ['scripts/licences.mjs'], { log: 'licences', step }))
})

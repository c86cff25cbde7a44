// Runs the fuzz targets one after the other, each for so many seconds: node scripts/fuzz.mjs [--seconds 300] [target...]
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { root } from './lib/paths.mjs'
import { step } from './lib/progress.mjs'
import { Failure, main, output, run } from './lib/run.mjs'

const targets = () =>
  [...readFileSync(join(root, 'fuzz/Cargo.toml'), 'utf8').matchAll(/^\[\[bin\]\]\nname = "(.*)"/gm)].map(
    ([, name]) => name,
  )

/** The sanitizer costs more than half of the speed, and crates that forbid unsafe code have nothing for it to find. */
const UNSAFE = new Set(['interpreter', 'loader'])

/** The first 129 bytes are the mode and the registers: without these limits code would come late. */
const LIMITS = { interpreter: ['-len_control=0', '-max_len=512'] }

await main(async () => {
  const { values, positionals } = parseArgs({
    options: { seconds: { type: 'string', default: '300' } },
    allowPositionals: true,
  })
  const seconds = Number(values.seconds)
  if (!(seconds > 0)) throw new Failure(`--seconds ${values.seconds}: a number above 0 is wanted`, 2)
  const known = targets()
  const unknown = positionals.filter((name) => !known.includes(name))
  if (unknown.length > 0) throw new Failure(`no target ${unknown.join(', ')}; there are ${known.join(', ')}`, 2)
  if (!(await output('cargo', ['+nightly', '--version'])))
    throw new Failure('nightly Rust is missing: rustup toolchain install nightly')
  if (!(await output('cargo-fuzz', ['--version'])))
    throw new Failure('cargo-fuzz is missing: cargo install cargo-fuzz --locked')

  let failed = 0
  for (const target of positionals.length > 0 ? positionals : known) {
    try {
      await step(`fuzz ${target}`, async (step) => {
        let done = ''
        const sanitizer = UNSAFE.has(target) ? 'address' : 'none'
        const limits = [`-max_total_time=${seconds}`, ...(LIMITS[target] ?? [])]
        await run('cargo', ['+nightly', 'fuzz', 'run', '--sanitizer', sanitizer, target, '--', ...limits], {
          log: `fuzz-${target}`,
          step,
          milestone: (line) => /panicked at|SUMMARY|ERROR: /.test(line),
          onLine: (line) => {
            done = line.match(/^Done (\d+) runs/)?.[1] ?? done
          },
        })
        return `${done} runs without a finding`
      })
    } catch (error) {
      if (!(error instanceof Failure)) throw error
      failed += 1
      process.stderr.write(`${error.message}\n`)
    }
  }
  return failed > 0 ? 1 : 0
})

// npm run test:kvm: the tests that need a real KVM, on this machine's own if its processor has VT-x or SVM, else in L1 (a host
// that QEMU emulates, docs/testing.md). `npm run test:kvm -- cargo`, `-- boot` run a part, --file PATH
// (repeatable) those boot tests alone; --l1 takes L1 in any case, a fresh one for each part; --timeout
// MINUTES is for each, --tries N where L1 fails.
// Ends with one line of totals on stdout; the exit status is non-zero if anything failed.
import { createWriteStream, mkdirSync, readdirSync, rmSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'
import { parseArgs } from 'node:util'
import { build, isCompiling } from './lib/build.mjs'
import { hardwareKvm } from './lib/kvm.mjs'
import { prepareL1 } from './lib/l1/image.mjs'
import { checkL1, runInL1 } from './lib/l1/run.mjs'
import { lines } from './lib/lines.mjs'
import { bin, logs, root, state } from './lib/paths.mjs'
import { duration, plain, step } from './lib/progress.mjs'
import { Failure, main, run } from './lib/run.mjs'
import { isCargoFailure, isVitestMilestone } from './lib/runners.mjs'
import { markers, script } from './lib/suite.mjs'
import { checkTools } from './lib/tools.mjs'
import { libtestResult, Totals, vitestResult } from './lib/totals.mjs'

const PARTS = ['cargo', 'boot']
/** The crate that is all about KVM, and those of whose tests the ones with `kvm` in their names are. */
const CRATES = { 'skep-kvm': [], 'skep-machine': ['kvm'] }
/** Guests of up to 2 GiB run in it, and what tests write is in memory. */
const L1 = { memory: '5G' }
/** Bad input is refused before a processor runs, and 50 starts of the command take 5 minutes in L1. */
const WITHOUT_GUESTS = 'refusals.test.ts'
const BOOT_TESTS = 'test/boot'
/** Where a boot takes half a minute, fewer of them; the environment of the same name has precedence. */
const FEWER_IN_L1 = { SKEP_BOOTS: '5', SKEP_CYCLES: '40' }
/** For each part, in minutes: the tests of the crates, or one file of boot tests. */
const TIMEOUT = '45'
/** How often a part is tried where L1 itself fails, which stands still at times (docs/testing.md). What fails in it is not. */
const TRIES = '3'

/** Builds the test programs; how each is run. */
async function cargoCommands() {
  const commands = []
  const onLine = (line) => {
    if (!line.startsWith('{"reason":"compiler-artifact"')) return
    const { executable, profile, package_id, manifest_path } = JSON.parse(line)
    if (!executable || !profile.test) return
    const filters = Object.entries(CRATES).find(([name]) => package_id.includes(name))?.[1] ?? []
    commands.push({ args: [executable, ...filters], cwd: dirname(manifest_path), env: { SKEP_TEST_KVM: '1' } })
  }
  const packages = Object.keys(CRATES).flatMap((name) => ['--package', name])
  const args = ['test', ...packages, '--no-run', '--message-format=json-render-diagnostics']
  await step('build the cargo tests', (step) =>
    run('cargo', args, { log: 'cargo-test-kvm-build', step, milestone: isCompiling, onLine }),
  )
  if (commands.length === 0) throw new Failure('cargo has built no tests')
  return commands
}

async function cargoPart() {
  const commands = await cargoCommands()
  return {
    title: 'cargo test under KVM',
    log: 'cargo-test-kvm',
    commands,
    milestone: isCargoFailure,
    finish(statuses, lines) {
      const totals = new Totals()
      const results = lines.map(libtestResult).filter(Boolean)
      for (const result of results) totals.add(result)
      // A program that died before its last line has not said what failed.
      totals.add({ failed: Math.max(0, statuses.length - results.length) })
      if (statuses.some((status) => status !== 0) && totals.failed === 0) totals.add({ failed: 1 })
      return totals
    },
  }
}

/** The end-to-end tests, each file a part. Their guests must be in the cache: L1 has no network. */
async function bootParts(direct, chosen) {
  await step('prepare the guests', (step) =>
    run(bin('vitest'), ['run', '--project', 'guests'], { log: 'vitest-guests', step, env: { NO_COLOR: '1' } }),
  )
  mkdirSync(state, { recursive: true })
  const all = readdirSync(join(root, BOOT_TESTS)).filter((name) => name.endsWith('.test.ts') && name !== WITHOUT_GUESTS)
  const files = chosen.length > 0 ? chosen : all.sort().map((name) => join(BOOT_TESTS, name))
  const fewer = Object.entries(direct ? {} : FEWER_IN_L1).map(([name, value]) => [name, process.env[name] ?? value])
  return files.map((file) => bootPart(file, Object.fromEntries(fewer)))
}

function bootPart(file, env) {
  const name = basename(file, '.test.ts')
  const report = join(state, `vitest-boot-kvm-${name}.json`)
  const vitest = join(root, 'node_modules/vitest/vitest.mjs')
  const reporters = ['--reporter=verbose', '--reporter=json', `--outputFile.json=${report}`]
  return {
    title: `vitest boot under KVM: ${name}`,
    log: `vitest-boot-kvm-${name}`,
    commands: [
      {
        args: [process.execPath, vitest, 'run', '--project', 'boot', file, ...reporters],
        cwd: root,
        env: { SKEP_TEST_ACCEL: 'kvm', NO_COLOR: '1', ...env },
      },
    ],
    milestone: isVitestMilestone,
    prepare: () => rmSync(report, { force: true }),
    finish([status], lines) {
      // It gives its processes a minute, which is not enough in L1 on a very busy machine.
      if (lines.some((line) => line.includes('[vitest-pool]: Failed to start')))
        throw new Failure('vitest could not start the tests in time')
      const totals = new Totals()
      try {
        totals.add(vitestResult(report))
      } catch (error) {
        if (status === 0) throw new Failure(`vitest ran, but its report cannot be read: ${error.message}`)
      }
      if (status !== 0 && totals.failed === 0) totals.add({ failed: 1 })
      return totals
    },
  }
}

/** Runs the script of a part by `start`, shows its lines as they come, keeps them in a file, and adds up what they tell. */
async function runPart({ title, log, commands, milestone, prepare, finish }, start) {
  mkdirSync(logs, { recursive: true })
  prepare?.()
  const file = createWriteStream(join(logs, `${log}.log`))
  const marks = markers()
  const seen = []
  let totals
  await step(title, async (step) => {
    await start(script(commands), (line) => {
      if (marks.take(line)) return
      file.write(`${line}\n`)
      seen.push(plain(line))
      step.note(line, { milestone: milestone(plain(line)) })
    })
    const { statuses } = marks
    if (statuses.length < commands.length) throw new Failure('the tests ended before their end')
    totals = finish(statuses, seen)
    return `${totals}`
  }).finally(() => file.end())
  return totals
}

/** The same, again where that which runs it has failed; a part that never comes to its end is one failure. */
async function tryPart(part, start, tries) {
  for (let left = tries - 1; ; left--) {
    try {
      return await runPart(part, start)
    } catch (error) {
      if (!(error instanceof Failure)) throw error
      const again = left > 0
      process.stderr.write(`\n${part.title}: ${error.message}${again ? '\n\ntrying it again' : ''}\n`)
      if (!again) return { failed: 1 }
    }
  }
}

await main(async () => {
  const started = Date.now()
  const { values, positionals: chosen } = parseArgs({
    options: {
      l1: { type: 'boolean', default: false },
      timeout: { type: 'string', default: TIMEOUT },
      tries: { type: 'string', default: TRIES },
      file: { type: 'string', multiple: true, default: [] },
    },
    allowPositionals: true,
  })
  const unknown = chosen.filter((part) => !PARTS.includes(part))
  if (unknown.length > 0) throw new Failure(`unknown part ${unknown.join(', ')}; there are ${PARTS.join(', ')}`, 2)
  const timeout = Number(values.timeout) * 60_000
  if (!(timeout > 0)) throw new Failure(`--timeout ${values.timeout}: a number of minutes is wanted`, 2)
  const tries = Number(values.tries)
  if (!(Number.isInteger(tries) && tries > 0)) throw new Failure(`--tries ${values.tries}: a number is wanted`, 2)
  const wanted = (part) => chosen.length === 0 || chosen.includes(part)

  const { usable, reason } = hardwareKvm()
  const direct = usable && !values.l1
  if (!direct) await checkL1()
  await checkTools({ guests: wanted('boot') || !direct, tests: true })
  await build()
  const parts = []
  if (wanted('cargo')) parts.push(await cargoPart())
  if (wanted('boot')) parts.push(...(await bootParts(direct, values.file)))
  if (!direct) await prepareL1()

  process.stderr.write(`${reason}: ${direct ? 'testing on this machine' : 'testing in L1'}\n`)
  const start = async (text, onLine) => {
    // timeout(1) ends all that the shell has started.
    const here = ['--kill-after=10', `${timeout / 1000}`, 'sh', '-c', text]
    if (direct) return run('timeout', here, { allowFailure: true, onLine })
    const onStdout = lines(onLine)
    return runInL1(['sh', '-c', text], { ...L1, timeout, writable: [state], onStdout, onStderr: onStdout })
  }
  const totals = new Totals()
  for (const part of parts) totals.add(await tryPart(part, start, direct ? 1 : tries))
  process.stderr.write(`\n${duration(Date.now() - started)} in all; full output of every step: ${logs}\n`)
  process.stdout.write(`${totals}\n`)
  return totals.failed > 0 ? 1 : 0
})

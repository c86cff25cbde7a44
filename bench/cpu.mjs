// npm run bench:cpu: the same static kernels and the same whole programs in the same guest under Skep's software CPU and under
// QEMU's TCG, and natively, in turn, one program at a time. Ratios, every sample in JSON, and a picture (docs/performance.md).
import { parseArgs } from 'node:util'
import { build } from '../scripts/lib/build.mjs'
import { prepareGuest } from '../scripts/lib/guest.mjs'
import { step } from '../scripts/lib/progress.mjs'
import { Failure, main } from '../scripts/lib/run.mjs'
import { checkTools } from '../scripts/lib/tools.mjs'
import { picture } from './lib/cpu-chart.mjs'
import { prepareCpuGuest } from './lib/cpu-guest.mjs'
import { orderFor, subjects } from './lib/cpu-programs.mjs'
import { perOperation, report, summarise, time, times } from './lib/cpu-report.mjs'
import { host } from './lib/host.mjs'
import { chosenOf, whole } from './lib/options.mjs'
import { qemuTcg, qemuVersion, skep } from './lib/peers.mjs'
import { keep, keepJson, resultFile } from './lib/results.mjs'
import { Session } from './lib/session.mjs'

const HELP = `npm run bench:cpu -- [options]

Runs kernels and whole programs in a guest under Skep's software CPU, under QEMU's TCG, and natively.

  --runs N          rounds, each with new machines; medians are told (3)
  --only PATTERN    only what has one of these in its name or group, with commas: --only chase,programs
  --quick           one round of 100 ms each, unless --runs or --ms say otherwise
  --ms N            least milliseconds that each is measured for (300)
  --cpus N          vCPUs, and processors for native runs (1)
  --memory SIZE     guest memory (2G)
  --cpu MODEL       processor that Skep's guest sees, as the option cpu of a machine (host)
  --engine NAME     engine of the software CPU: jit or interpreter (what Skep takes by itself)
  --skip-native     machines alone
  --skip-qemu       without QEMU
  --qemu PROGRAM    (qemu-system-x86_64)
  --qemu-cpu MODEL  QEMU's processor (max)
  --time wall|cpu   what counts: time by the clock, or that of the processors, which other work on the host spoils less (wall)
  --timeout S       most seconds for one program, or one boot, before the machine is given up (600)
  --json FILE       where the results go (bench/results/cpu-DATE.json)
  --svg FILE        where the picture goes (bench/results/cpu-DATE.svg)
  --prepare         measures nothing: makes the guest, and tells a command for each that runs it alone, without Node
  --list            what there is to measure
  --help

Ends with status 0, 1 if anything failed (the rest is told all the same), 2 if an option is wrong.
`

/** A peer that does not boot so many times in a row is given up. */
const BOOTS = 2
/** A sample is taken again, so many times in all, if the process had less than this part of the time that is wanted. */
const TRIES = 3
const ENOUGH = 0.4
const CMDLINE = 'console=ttyS0 quiet panic=-1'
/** A native run sees the guest's files as its own, in a name space that ends with it. */
const NATIVE =
  'mount --rbind /dev "$0/dev" && mount --rbind /proc "$0/proc" && exec chroot "$0" /bench/guest serve "$1" 3>&-'

function options() {
  let values
  try {
    values = parseArgs({
      options: {
        runs: { type: 'string' },
        only: { type: 'string' },
        quick: { type: 'boolean', default: false },
        ms: { type: 'string' },
        cpus: { type: 'string', default: '1' },
        memory: { type: 'string', default: '2G' },
        cpu: { type: 'string' },
        engine: { type: 'string' },
        'skip-native': { type: 'boolean', default: false },
        'skip-qemu': { type: 'boolean', default: false },
        qemu: { type: 'string', default: 'qemu-system-x86_64' },
        'qemu-cpu': { type: 'string', default: 'max' },
        time: { type: 'string', default: 'wall' },
        timeout: { type: 'string', default: '600' },
        json: { type: 'string' },
        svg: { type: 'string' },
        prepare: { type: 'boolean', default: false },
        list: { type: 'boolean', default: false },
        help: { type: 'boolean', default: false },
      },
    }).values
  } catch (error) {
    throw new Failure(`${error.message}\n\n${HELP}`, 2)
  }
  if (values.engine !== undefined) chosenOf(values.engine, ['jit', 'interpreter'], 'engine')
  if (!times.includes(values.time)) throw new Failure(`--time ${values.time}: ${times.join(' or ')}`, 2)
  return {
    ...values,
    runs: whole(values.runs ?? (values.quick ? '1' : '3'), 'runs'),
    ms: whole(values.ms ?? (values.quick ? '100' : '300'), 'ms'),
    cpus: whole(values.cpus, 'cpus'),
    timeout: whole(values.timeout, 'timeout') * 1000,
  }
}

/** What is to be measured. */
function chosenSubjects(only) {
  if (only === undefined) return subjects()
  const patterns = only.split(',')
  const chosen = subjects().filter(({ name, group }) => patterns.some((one) => name.includes(one) || group === one))
  if (chosen.length === 0) throw new Failure(`--only ${only}: nothing is called so; see --list`, 2)
  return chosen
}

/** One that is compared: it has a session while it is well. */
class Peer {
  #start
  #session
  #failedBoots = 0
  reports = []

  constructor(name, start, { timeout }) {
    this.name = name
    this.#start = start
    this.timeout = timeout
  }

  /** A session that takes orders; the milliseconds until it did, if it is new. */
  async boot() {
    if (this.#session) return undefined
    if (this.#failedBoots >= BOOTS) throw new Error('it does not start')
    const session = new Session(...this.#start, { machine: this.name !== 'native' })
    try {
      const bootMs = await session.ready(this.timeout)
      this.#session = session
      this.#failedBoots = 0
      return bootMs
    } catch (error) {
      this.#failedBoots++
      await session.close()
      throw error
    }
  }

  async order(text) {
    await this.boot()
    try {
      return await this.#session.order(text, this.timeout)
    } catch (error) {
      if (error.fatal) await this.close()
      throw error
    }
  }

  async close() {
    const session = this.#session
    this.#session = undefined
    const report = await session?.close()
    if (report) this.reports.push(report)
  }
}

/** Skep's machine. */
const configure = ({ cpus, memory, cpu, engine }, boot) => ({
  ...{ cpus, memory, accel: 'software', onReboot: 'exit', boot },
  ...(cpu && { cpu }),
  ...(engine && { engine }),
})

function peers(chosen, boot, tree) {
  const { cpus, memory, qemu } = chosen
  const names = process.getuid() === 0 ? ['--mount'] : ['--mount', '--map-root-user']
  const starts = {
    skep: skep(configure(chosen, boot)),
    tcg: !chosen['skip-qemu'] && qemuTcg({ qemu, cpu: chosen['qemu-cpu'], cpus, memory, ...boot }),
    native: !chosen['skip-native'] && ['unshare', [...names, 'sh', '-c', NATIVE, tree, `${cpus}`]],
  }
  return Object.entries(starts)
    .filter(([, start]) => start)
    .map(([name, start]) => new Peer(name, start, chosen))
}

/** For a profile of one thing: the crate's example program boots the guest, runs it, and the guest powers off. */
async function commands(wanted, { ms, cpus, memory, engine }, { kernel, initrd }) {
  const { parseSize } = await import('../dist/index.js')
  const mib = Number(parseSize(memory)) / (1 << 20)
  const machine = `-m ${mib} -c ${cpus} --kernel ${kernel} --initrd ${initrd} --stats${engine ? ` --engine ${engine}` : ''}`
  const run = `cargo run --release --package skep-machine --example run -- ${machine}`
  return wanted.map((subject) => `${run} --cmdline '${CMDLINE} -- ${orderFor(subject, ms)}' </dev/null\n`).join('')
}

/** The same in another order each time. */
const turned = (list, by) => list.map((_, i) => list[(i + by) % list.length])

const firstLine = (error) => error.message.split('\n')[0].slice(0, 300)

/** One sample, again where so little processor time was left for it that it says nothing. */
async function measure(peer, subject, ms) {
  for (let left = TRIES; ; left--) {
    const result = await peer.order(orderFor(subject, ms))
    if (left === 1 || result.skipped || result.cpuMs >= ms * ENOUGH) return result
  }
}

/** All subjects once, under each peer; new machines. */
async function round(run, all, wanted, chosen, step, samples, boots) {
  for (const peer of turned(all, run)) {
    try {
      const bootMs = await peer.boot()
      boots.push({ peer: peer.name, run, bootMs })
      step.note(`${peer.name} takes orders after ${(bootMs / 1000).toFixed(1)} s`, { milestone: true })
    } catch (error) {
      boots.push({ peer: peer.name, run, error: error.message })
      step.note(`${peer.name} does not start: ${firstLine(error)}`, { milestone: true })
    }
  }
  for (const [index, subject] of wanted.entries()) {
    const told = []
    for (const peer of turned(all, run + index)) {
      step.note(`${subject.name} (${index + 1} of ${wanted.length}), ${peer.name}`)
      const sample = { name: subject.name, peer: peer.name, run }
      try {
        Object.assign(sample, await measure(peer, subject, chosen.ms))
        told.push(`${peer.name} ${sample.skipped ?? time(perOperation(sample, chosen.time))}`)
      } catch (error) {
        sample.error = error.message
        told.push(`${peer.name} failed: ${firstLine(error)}`)
      }
      samples.push(sample)
    }
    step.note(`${subject.name}: ${told.sort().join(', ')}`, { milestone: true })
  }
}

await main(async () => {
  const chosen = options()
  if (chosen.help) return void process.stdout.write(HELP)
  const wanted = chosenSubjects(chosen.only)
  if (chosen.list) {
    for (const { name, group, unit, about } of wanted)
      process.stdout.write(`${name.padEnd(14)}${group.padEnd(10)}${about ?? `per ${unit}`}\n`)
    return
  }
  await checkTools({ guests: true })
  const version = chosen['skip-qemu'] ? undefined : await qemuVersion(chosen.qemu)
  await build()
  const { kernel } = await prepareGuest()
  const guest = await prepareCpuGuest({ programs: wanted.some(({ command }) => command) })
  const boot = { kernel, initrd: guest.initrd, cmdline: CMDLINE }
  if (chosen.prepare) return void process.stdout.write(await commands(wanted, chosen, boot))
  const { resolve } = await import('../dist/index.js')
  const { engine } = resolve(configure(chosen, boot))
  const about = { ...(await host()), qemu: version, engine, options: chosen, boot, packages: guest.packages }
  const all = peers(chosen, boot, guest.tree)

  const samples = []
  const boots = []
  const names = all.map(({ name }) => name)
  const json = chosen.json ?? resultFile('cpu', about.date)
  const svg = chosen.svg ?? resultFile('cpu', about.date, 'svg')
  let summary
  for (let run = 1; run <= chosen.runs; run++) {
    await step(`round ${run} of ${chosen.runs}`, async (step) => {
      try {
        await round(run, all, wanted, chosen, step, samples, boots)
      } finally {
        await Promise.all(all.map((peer) => peer.close()))
      }
    })
    // After every round: who stops it keeps what is there.
    summary = summarise(wanted, samples, chosen.time)
    const reports = Object.fromEntries(all.map(({ name, reports }) => [name, reports]))
    keepJson(json, { about, summary, boots, samples, reports })
    keep(svg, picture(summary, names, about))
  }

  process.stdout.write(
    `${report(summary, names)}\n\nMedians of ${chosen.runs}${chosen.time === 'cpu' ? ', CPU time' : ''}.\n${json}\n${svg}\n`,
  )
  return samples.some(({ error }) => error) ? 1 : 0
})

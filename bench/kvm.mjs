// npm run bench:kvm: the same kernel and initramfs under KVM by Skep (in Node, and in a process without it) and by QEMU (q35 and
// microvm), in turn, each boot in a process of its own: time to the guest's init, exits, memory. On this machine's own KVM if
// its processor has VT-x or SVM, else in L1, where only the ratios mean something (docs/performance.md).
//   npm run bench:kvm -- [--runs 3] [--cpus 1] [--memory 512] [--log quiet,full] [--only NAME,...] [--l1] [--accel kvm]
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { build, isCompiling } from '../scripts/lib/build.mjs'
import { cpuTime } from '../scripts/lib/cpu-time.mjs'
import { prepareGuest } from '../scripts/lib/guest.mjs'
import { hardwareKvm } from '../scripts/lib/kvm.mjs'
import { prepareL1 } from '../scripts/lib/l1/image.mjs'
import { checkL1, QEMU, runInL1 } from '../scripts/lib/l1/run.mjs'
import { lines } from '../scripts/lib/lines.mjs'
import { root } from '../scripts/lib/paths.mjs'
import { step } from '../scripts/lib/progress.mjs'
import { Failure, main, run } from '../scripts/lib/run.mjs'
import { checkTools } from '../scripts/lib/tools.mjs'
import { host } from './lib/host.mjs'
import { INIT_MARKER, INIT_OPTION, markedInitrd } from './lib/marked.mjs'
import { chosenOf, whole } from './lib/options.mjs'
import { qemuVersion } from './lib/peers.mjs'
import { keepJson, resultFile } from './lib/results.mjs'
import { median, table } from './lib/stats.mjs'

const CONTENDERS = ['skep in node', 'skep bare', 'qemu q35', 'qemu microvm']
const LOGS = ['quiet', 'full']
/** Begins the lines that tell of a boot's progress (bench/lib/kvm-boots.mjs). */
const MARK = '\x1e'
const BOOT_TIMEOUT = 400_000
const TIMEOUT = 7_200_000
const L1 = { cpus: 1, memory: '3G' }
const MIB = 1 << 20

function options() {
  const { values } = parseArgs({
    options: {
      runs: { type: 'string', default: '3' },
      cpus: { type: 'string', default: '1' },
      memory: { type: 'string', default: '512' },
      log: { type: 'string', default: LOGS.join() },
      only: { type: 'string', default: CONTENDERS.join() },
      accel: { type: 'string', default: 'kvm' },
      l1: { type: 'boolean', default: false },
    },
  })
  return {
    runs: whole(values.runs, 'runs'),
    cpus: values.cpus.split(',').map((text) => whole(text, 'cpus')),
    memoryMiB: whole(values.memory, 'memory'),
    logs: chosenOf(values.log, LOGS, 'log'),
    contenders: chosenOf(values.only, CONTENDERS, 'only'),
    accel: chosenOf(values.accel, ['kvm', 'software'], 'accel')[0],
    l1: values.l1,
  }
}

/** Skep without Node: the example program of the crate. */
async function buildBare() {
  let path
  const onLine = (line) => {
    if (line.startsWith('{"reason":"compiler-artifact"')) path = JSON.parse(line).executable ?? path
  }
  const args = ['build', '--release', '--package', 'skep-machine', '--example', 'run']
  await step('build Skep without Node', (step) =>
    run('cargo', [...args, '--message-format=json-render-diagnostics'], {
      log: 'build-bare',
      step,
      milestone: isCompiling,
      onLine,
    }),
  )
  if (!path) throw new Failure('cargo has built no example')
  return path
}

/** A count of the kernel's by way of `vm.stats()`: debugfs names a VM after the thread that made it, which may be gone. */
function reported(report, name) {
  const counts = report?.vcpus.map(({ kernel }) => kernel ?? {}) ?? []
  if (!counts.some((kernel) => Object.keys(kernel).length > 0)) return undefined
  return counts.reduce((sum, kernel) => sum + (kernel[name] ?? 0), 0)
}

/** One line of the table and of the summary, from the samples of one kind of boot. */
function summary(samples) {
  const good = samples.filter(({ error }) => !error)
  if (good.length === 0) return { failed: samples.length }
  const of = (value) => {
    const values = good.map(value).filter((number) => number !== undefined)
    return values.length > 0 ? median(values) : undefined
  }
  const count = (name) => of(({ kernel, report }) => kernel?.[name] ?? reported(report, name))
  // Skep counts what came back to its own process; QEMU does not say.
  const toProcess = ({ report }) =>
    report?.vcpus.flatMap(({ exits }) => Object.values(exits ?? {})).reduce((sum, n) => sum + n, 0)
  return {
    failed: samples.length - good.length,
    wallMs: of(({ wallMs }) => wallMs),
    cpuMs: of(({ cpuMs }) => cpuMs),
    l1Ms: of(({ l1Ms }) => l1Ms),
    exits: count('exits'),
    ioExits: count('io_exits'),
    mmioExits: count('mmio_exits'),
    exitsToProcess: of(toProcess),
    overheadBytes: of(({ memory }) => memory.overhead),
    guestBytes: of(({ memory }) => memory.guest),
  }
}

const shown = (value, format = (n) => n.toFixed(0)) => (value === undefined ? '–' : format(value))
const seconds = (ms) => (ms / 1000).toFixed(2)
const mib = (bytes) => (bytes / MIB).toFixed(1)

await main(async () => {
  const chosen = options()
  const here = hardwareKvm()
  const direct = (here.usable || chosen.accel === 'software') && !chosen.l1
  const version = await qemuVersion(QEMU)
  await checkTools({ guests: true })
  await build()
  const bare = await buildBare()
  const guest = await prepareGuest()
  if (!direct) {
    await checkL1()
    await prepareL1()
  }
  const cmdlines = Object.fromEntries(
    chosen.logs.map((log) => [log, `${guest.cmdline} ${INIT_OPTION}${log === 'quiet' ? ' quiet' : ''}`]),
  )
  const plan = {
    ...chosen,
    ...{ kernel: guest.kernel, initrd: await markedInitrd(guest), cmdlines, marker: INIT_MARKER },
    ...{ timeout: BOOT_TIMEOUT, qemu: QEMU, bare },
  }
  const about = { ...(await host()), l1: !direct && L1, qemu: version, ...plan }

  const command = [process.execPath, join(root, 'bench/lib/kvm-boots.mjs'), JSON.stringify(plan)]
  process.stderr.write(`${here.reason}: measuring ${direct ? 'on this machine' : 'in L1'}\n`)
  let samples
  await step('boot', async (step) => {
    let last = ''
    // What a boot has cost the process that emulates L1: unlike time, it does not depend on what else runs here.
    let emulator
    const begun = new Map()
    const costs = new Map()
    const note = (line) => {
      if (!line.startsWith(MARK)) return step.note(line, { milestone: true })
      const [what, boot] = line.slice(MARK.length).split(' ')
      if (emulator === undefined) return
      if (what === 'start') begun.set(boot, cpuTime(emulator))
      else costs.set(boot, cpuTime(emulator) - begun.get(boot))
    }
    const take = (line) => {
      if (line.startsWith('[')) last = line
      else note(line)
    }
    const onSpawn = (pid) => {
      emulator = pid
    }
    const status = direct
      ? await run(command[0], command.slice(1), { log: 'bench-kvm', allowFailure: true, onLine: take })
      : await runInL1(command, { ...L1, timeout: TIMEOUT, onStdout: lines(take), onStderr: lines(note), onSpawn })
    if (status !== 0 || !last) throw new Failure(`${command.slice(0, 2).join(' ')} ended with status ${status}`)
    samples = JSON.parse(last).map((sample) => ({ ...sample, l1Ms: costs.get(`${sample.boot}`) }))
  })

  const kinds = chosen.logs.flatMap((log) =>
    chosen.cpus.flatMap((cpus) => chosen.contenders.map((name) => ({ name, cpus, log }))),
  )
  const results = kinds.map((kind) => ({
    ...kind,
    ...summary(samples.filter((one) => one.name === kind.name && one.cpus === kind.cpus && one.log === kind.log)),
  }))
  const costs = direct ? [] : ['CPU of L1, s', 'of q35']
  const head = ['', 'vCPUs', 'log', 'to init, s', 'of q35', ...costs, 'CPU, s', 'exits', 'port', 'MMIO', 'to process']
  const rows = [[...head, 'overhead, MiB', 'guest, MiB']]
  for (const one of results) {
    const q35 = results.find(({ name, cpus, log }) => name === 'qemu q35' && cpus === one.cpus && log === one.log)
    const ratio = (name) => shown(one[name] && q35?.[name] ? one[name] / q35[name] : undefined, (n) => n.toFixed(2))
    rows.push([
      one.name,
      one.cpus,
      one.log,
      one.failed ? `${one.failed} failed` : shown(one.wallMs, seconds),
      ratio('wallMs'),
      ...(direct ? [] : [shown(one.l1Ms, seconds), ratio('l1Ms')]),
      shown(one.cpuMs, seconds),
      ...[one.exits, one.ioExits, one.mmioExits, one.exitsToProcess].map((n) => shown(n)),
      ...[one.overheadBytes, one.guestBytes].map((n) => shown(n, mib)),
    ])
  }
  const file = keepJson(resultFile('kvm', about.date), { about, summary: results, samples })
  process.stdout.write(`${table(rows)}\n\nMedians of ${chosen.runs}${direct ? '' : ', in L1'}.\n${file}\n`)
  return samples.some(({ error }) => error) ? 1 : 0
})

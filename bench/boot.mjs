// npm run bench:boot: the same kernel and initramfs booted to a shell by Skep and by QEMU's TCG, in turn, each in a
// process of its own; wall time runs from the start of the process to the guest's init and to the prompt. Medians, and every
// sample in JSON.
//   npm run bench:boot -- [--runs 3] [--cpus 1,2] [--memory 512M] [--engine jit|interpreter] [--only skep|qemu]
//                         [--qemu qemu-system-x86_64] [--qemu-cpu qemu64]
import { parseArgs } from 'node:util'
import { build } from '../scripts/lib/build.mjs'
import { prepareGuest } from '../scripts/lib/guest.mjs'
import { step } from '../scripts/lib/progress.mjs'
import { main } from '../scripts/lib/run.mjs'
import { checkTools } from '../scripts/lib/tools.mjs'
import { host } from './lib/host.mjs'
import { INIT_MARKER, INIT_OPTION, markedInitrd } from './lib/marked.mjs'
import { chosenOf, whole } from './lib/options.mjs'
import { qemuTcg, qemuVersion, skep } from './lib/peers.mjs'
import { keepJson, resultFile } from './lib/results.mjs'
import { median, table } from './lib/stats.mjs'
import { trial } from './lib/trial.mjs'

const TIMEOUT = 300_000
const SKEP = 'skep software'
const QEMU = 'qemu tcg q35'

function options() {
  const { values } = parseArgs({
    options: {
      runs: { type: 'string', default: '3' },
      cpus: { type: 'string', default: '1,2' },
      memory: { type: 'string', default: '512M' },
      engine: { type: 'string' },
      qemu: { type: 'string', default: 'qemu-system-x86_64' },
      'qemu-cpu': { type: 'string', default: 'qemu64' },
      only: { type: 'string' },
    },
  })
  const { only, engine } = values
  if (only !== undefined) chosenOf(only, ['skep', 'qemu'], 'only')
  if (engine !== undefined) chosenOf(engine, ['jit', 'interpreter'], 'engine')
  return {
    ...values,
    runs: whole(values.runs, 'runs'),
    cpus: values.cpus.split(',').map((text) => whole(text, 'cpus')),
  }
}

/** The contenders: a name, and how to start one boot. */
function contenders({ engine, qemu, 'qemu-cpu': cpu, memory, only }, boot) {
  const software = { memory, accel: 'software', ...(engine && { engine }) }
  const all = [
    { name: SKEP, key: 'skep', start: (cpus) => skep({ ...software, cpus, boot }) },
    { name: QEMU, key: 'qemu', start: (cpus) => qemuTcg({ qemu, cpu, cpus, memory, ...boot }) },
  ]
  return all.filter(({ key }) => !only || key === only)
}

/** The guest's instructions; the JIT counts only those that it leaves to the interpreter. */
const instructions = (report) => report.vcpus.reduce((sum, vcpu) => sum + Number(vcpu.instructions), 0)
const seconds = (ms) => (ms / 1000).toFixed(2)

await main(async () => {
  const chosen = options()
  await checkTools({ guests: true })
  const version = chosen.only === 'skep' ? undefined : await qemuVersion(chosen.qemu)
  await build()
  const guest = await prepareGuest()
  const boot = {
    kernel: guest.kernel,
    initrd: await markedInitrd(guest),
    cmdline: `${guest.cmdline} ${INIT_OPTION}`,
  }
  const about = { ...(await host()), qemu: version, guest, options: chosen }
  const all = contenders(chosen, boot)

  const samples = []
  for (let run = 1; run <= chosen.runs; run++) {
    for (const cpus of chosen.cpus) {
      for (const { name, start } of all) {
        await step(`run ${run}/${chosen.runs}: ${name}, ${cpus} vCPU`, async () => {
          const result = await trial(...start(cpus), {
            marker: guest.prompt,
            marks: { init: INIT_MARKER },
            timeout: TIMEOUT,
          })
          samples.push({ name, cpus, run, ...result })
          return `init after ${seconds(result.initMs)} s, prompt after ${seconds(result.wallMs)} s`
        })
      }
    }
  }

  const rows = [
    ['', 'vCPUs', 'to init, s', 'of TCG', 'to prompt, s', 'CPU, s', 'of TCG', 'instructions, G', 'MIPS (CPU time)'],
  ]
  const summary = []
  for (const cpus of chosen.cpus) {
    // The guest does about the same work under both; QEMU does not say how much, so Skep's count stands in for it.
    const counted = samples
      .filter((one) => one.cpus === cpus && one.report?.engine === 'interpreter')
      .map((one) => instructions(one.report))
    const work = counted.length > 0 ? median(counted) : undefined
    for (const { name } of all) {
      const mine = samples.filter((one) => one.name === name && one.cpus === cpus)
      const initMs = median(mine.map((one) => one.initMs))
      const wallMs = median(mine.map((one) => one.wallMs))
      const cpuMs = median(mine.map((one) => one.cpuMs))
      const estimated = !mine[0].report
      const mips = work === undefined ? undefined : work / 1000 / cpuMs
      summary.push({ name, cpus, initMs, wallMs, cpuMs, instructions: work, mips, estimated })
    }
  }
  for (const { name, cpus, initMs, wallMs, cpuMs, instructions: work, mips, estimated } of summary) {
    const tcg = summary.find((other) => other.name === QEMU && other.cpus === cpus)
    const mark = estimated ? ' (est.)' : ''
    rows.push([
      name,
      cpus,
      seconds(initMs),
      tcg ? (initMs / tcg.initMs).toFixed(2) : '–',
      seconds(wallMs),
      seconds(cpuMs),
      tcg ? (cpuMs / tcg.cpuMs).toFixed(2) : '–',
      work ? `${(work / 1e9).toFixed(2)}${mark}` : '–',
      mips ? `${mips.toFixed(0)}${mark}` : '–',
    ])
  }

  const file = keepJson(resultFile('boot', about.date), { about, summary, samples })
  process.stdout.write(
    `${table(rows)}\n\nMedians of ${chosen.runs}. est.: the instruction count is Skep's for the same guest.\n${file}\n`,
  )
})

// npm run bench:boot: the same kernel and initramfs booted to a shell by Skep and by QEMU's TCG, in turn, each in a
// process of its own; wall time runs from the start of the process to the prompt. Medians, and every sample in JSON.
//   npm run bench:boot -- [--runs 3] [--cpus 1,2] [--memory 512M] [--qemu qemu-system-x86_64] [--only skep|qemu]
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { build } from '../scripts/lib/build.mjs'
import { prepareGuest } from '../scripts/lib/guest.mjs'
import { root } from '../scripts/lib/paths.mjs'
import { step } from '../scripts/lib/progress.mjs'
import { Failure, main, output } from '../scripts/lib/run.mjs'
import { checkTools } from '../scripts/lib/tools.mjs'
import { host } from './lib/host.mjs'
import { median, table } from './lib/stats.mjs'
import { trial } from './lib/trial.mjs'

const TIMEOUT = 300_000

function options() {
  const { values } = parseArgs({
    options: {
      runs: { type: 'string', default: '3' },
      cpus: { type: 'string', default: '1,2' },
      memory: { type: 'string', default: '512M' },
      qemu: { type: 'string', default: 'qemu-system-x86_64' },
      only: { type: 'string' },
    },
  })
  const runs = Number(values.runs)
  const cpus = values.cpus.split(',').map(Number)
  if (!Number.isInteger(runs) || runs < 1)
    throw new Failure(`--runs ${values.runs}: a whole number of at least 1 is wanted`, 2)
  if (!cpus.every((n) => Number.isInteger(n) && n > 0))
    throw new Failure(`--cpus ${values.cpus}: numbers with commas are wanted`, 2)
  if (values.only && !['skep', 'qemu'].includes(values.only))
    throw new Failure(`--only ${values.only}: skep or qemu`, 2)
  return { ...values, runs, cpus }
}

/** The contenders: a name, and how to start one boot. */
function contenders({ qemu, memory, only }, guest) {
  const script = join(root, 'bench/lib/skep-boot.mjs')
  const all = [
    {
      name: 'skep software',
      key: 'skep',
      start: (cpus) => [
        process.execPath,
        [
          script,
          JSON.stringify({
            cpus,
            memory,
            accel: 'software',
            boot: { kernel: guest.kernel, initrd: guest.initrd, cmdline: guest.cmdline },
          }),
        ],
      ],
    },
    {
      name: 'qemu tcg q35',
      key: 'qemu',
      start: (cpus) => [
        qemu,
        [
          '-accel',
          'tcg',
          '-machine',
          'q35',
          '-smp',
          `${cpus}`,
          '-m',
          memory,
          '-nodefaults',
          '-display',
          'none',
          '-no-reboot',
        ].concat(['-serial', 'stdio', '-kernel', guest.kernel, '-initrd', guest.initrd, '-append', guest.cmdline]),
      ],
    },
  ]
  return all.filter(({ key }) => !only || key === only)
}

const instructions = (report) => report.vcpus.reduce((sum, vcpu) => sum + Number(vcpu.instructions), 0)
const seconds = (ms) => (ms / 1000).toFixed(2)

await main(async () => {
  const chosen = options()
  await checkTools({ guests: true })
  const qemuVersion = chosen.only === 'skep' ? undefined : await output(chosen.qemu, ['--version'])
  if (chosen.only !== 'skep' && !qemuVersion)
    throw new Failure(`${chosen.qemu} is missing: sudo apt install qemu-system-x86`)
  await build()
  const guest = await prepareGuest()
  const about = { ...(await host()), qemu: qemuVersion?.split('\n')[0], guest, memory: chosen.memory }

  const samples = []
  for (let run = 1; run <= chosen.runs; run++) {
    for (const cpus of chosen.cpus) {
      for (const { name, start } of contenders(chosen, guest)) {
        await step(`run ${run}/${chosen.runs}: ${name}, ${cpus} vCPU`, async () => {
          const result = await trial(...start(cpus), { marker: guest.prompt, timeout: TIMEOUT })
          samples.push({ name, cpus, run, ...result })
          return `${seconds(result.wallMs)} s`
        })
      }
    }
  }

  const rows = [['', 'vCPUs', 'to prompt, s', 'CPU time, s', 'instructions, G', 'MIPS (CPU time)']]
  const summary = []
  for (const cpus of chosen.cpus) {
    // The guest does about the same work under both; QEMU does not say how much, so Skep's count stands in for it.
    const counted = samples.filter((one) => one.cpus === cpus && one.report).map((one) => instructions(one.report))
    const work = counted.length > 0 ? median(counted) : undefined
    for (const { name } of contenders(chosen, guest)) {
      const mine = samples.filter((one) => one.name === name && one.cpus === cpus)
      const wallMs = median(mine.map((one) => one.wallMs))
      const cpuMs = median(mine.map((one) => one.cpuMs))
      const estimated = !mine[0].report
      const mips = work === undefined ? undefined : work / 1000 / cpuMs
      summary.push({ name, cpus, wallMs, cpuMs, instructions: work, mips, estimated })
      const mark = estimated ? ' (est.)' : ''
      rows.push([
        name,
        cpus,
        seconds(wallMs),
        seconds(cpuMs),
        work ? `${(work / 1e9).toFixed(2)}${mark}` : '–',
        mips ? `${mips.toFixed(0)}${mark}` : '–',
      ])
    }
  }

  const folder = join(root, 'bench/results')
  mkdirSync(folder, { recursive: true })
  const file = join(folder, `boot-${about.date.replaceAll(':', '')}.json`)
  writeFileSync(file, `${JSON.stringify({ about, summary, samples }, null, 2)}\n`)
  process.stdout.write(
    `${table(rows)}\n\nMedians of ${chosen.runs}. est.: the instruction count is Skep's for the same guest.\n${file}\n`,
  )
})

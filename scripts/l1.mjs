// Runs a command where there is hardware virtualization: in L1, a Debian host that QEMU emulates (docs/testing.md).
//   node scripts/l1.mjs [options] -- COMMAND [ARGUMENT...]
import { resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { prepareL1 } from './lib/l1/image.mjs'
import { checkL1, DEFAULTS, runInL1 } from './lib/l1/run.mjs'
import { Failure, main } from './lib/run.mjs'

const HELP = `Usage: node scripts/l1.mjs [options] -- COMMAND [ARGUMENT...]

Runs COMMAND as root in L1: a Debian host with /dev/kvm, on a processor with SVM and nested paging that QEMU emulates. All
files of this machine are there under their own paths, node_modules, dist and target too; what COMMAND writes stays in
L1's memory and is gone afterwards. A start takes some 10 s, code runs some 10 times slower than here.

  -c, --cpus N          processors (${DEFAULTS.cpus})
  -m, --memory SIZE     memory, for files written too (${DEFAULTS.memory})
  -t, --timeout SECONDS for all of it (${DEFAULTS.timeout / 1000})
  -w, --writable FOLDER a folder of this machine that COMMAND may write; can be repeated
      --prepare         only make L1's kernel and initramfs, from Debian's packages
      --refresh         make them anew from today's packages
  -h, --help

The exit status is COMMAND's; 124 if the time was up, 125 if L1 failed.
`

function options() {
  try {
    return parseArgs({
      options: {
        cpus: { type: 'string', short: 'c', default: `${DEFAULTS.cpus}` },
        memory: { type: 'string', short: 'm', default: DEFAULTS.memory },
        timeout: { type: 'string', short: 't', default: `${DEFAULTS.timeout / 1000}` },
        writable: { type: 'string', short: 'w', multiple: true, default: [] },
        prepare: { type: 'boolean', default: false },
        refresh: { type: 'boolean', default: false },
        help: { type: 'boolean', short: 'h', default: false },
      },
      allowPositionals: true,
    })
  } catch (error) {
    throw new Failure(error.message, 2)
  }
}

await main(async () => {
  const { values, positionals } = options()
  if (values.help) {
    process.stdout.write(HELP)
    return 0
  }
  const cpus = Number(values.cpus)
  if (!Number.isInteger(cpus) || cpus < 1 || cpus > 64) throw new Failure(`--cpus ${values.cpus}: 1 to 64 is wanted`, 2)
  if (!/^\d+[KMG]$/.test(values.memory)) throw new Failure(`--memory ${values.memory}: a size such as 2G is wanted`, 2)
  const timeout = Number(values.timeout) * 1000
  if (!(timeout > 0 && timeout < 2 ** 31))
    throw new Failure(`--timeout ${values.timeout}: a number of seconds is wanted`, 2)
  const unusable = values.writable.find((path) => /[\s,]/.test(resolve(path)))
  if (unusable) throw new Failure(`--writable ${unusable}: QEMU takes no path with a comma or white space`, 2)
  await checkL1()
  if (values.prepare || values.refresh) await prepareL1({ refresh: values.refresh })
  if (positionals.length === 0) {
    if (values.prepare || values.refresh) return 0
    throw new Failure(`a command is wanted\n\n${HELP}`, 2)
  }
  return await runInL1(positionals, {
    cpus,
    memory: values.memory,
    timeout,
    cwd: process.cwd(),
    writable: values.writable.map((path) => resolve(path)),
    onStdout: (chunk) => process.stdout.write(chunk),
    onStderr: (chunk) => process.stderr.write(chunk),
  })
})

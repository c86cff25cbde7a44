// The boots of bench/kvm.mjs, to be run where KVM is. Arguments: one JSON object. Progress goes to stderr, a line a boot; the
// samples are one line of JSON on stdout.
import { fileURLToPath } from 'node:url'
import { kernelCounts, memory } from './inspect.mjs'
import { trial } from './trial.mjs'

const { contenders, runs, cpus, memoryMiB, kernel, initrd, cmdlines, marker, timeout, accel, qemu, bare } = JSON.parse(
  process.argv[2],
)

/** Only what every one of the machines has: memory, processors, one serial port. */
const qemuArgs = (machine, count, cmdline) => [
  ...['-machine', machine, '-accel', accel === 'kvm' ? 'kvm' : 'tcg'],
  ...['-cpu', accel === 'kvm' ? 'host' : 'max', '-smp', `${count}`, '-m', `${memoryMiB}M`],
  ...['-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot', '-serial', 'stdio'],
  ...['-kernel', kernel, '-initrd', initrd, '-append', cmdline],
]

const START = {
  'skep in node': (count, cmdline) => [
    process.execPath,
    [
      fileURLToPath(new URL('skep-boot.mjs', import.meta.url)),
      JSON.stringify({ cpus: count, memory: `${memoryMiB}M`, accel, boot: { kernel, initrd, cmdline } }),
    ],
  ],
  'skep bare': (count, cmdline) => [
    bare,
    ['--accel', accel, '--kernel', kernel, '--initrd', initrd, '--cmdline', cmdline].concat(
      ...['-m', `${memoryMiB}`, '-c', `${count}`],
    ),
  ],
  'qemu q35': (count, cmdline) => [qemu, qemuArgs('q35', count, cmdline)],
  'qemu microvm': (count, cmdline) => [qemu, qemuArgs('microvm', count, cmdline)],
}

const inspect = (pid) => ({ memory: memory(pid, memoryMiB << 20), kernel: kernelCounts(pid) })

/** Tells whoever runs this from outside that a boot begins or has come to init: the line begins with ASCII's record separator. */
const tell = (what, boot) => process.stderr.write(`\x1e${what} ${boot}\n`)

const samples = []
let boot = 0
// Run 0 warms the page cache and is not kept.
for (let run = 0; run <= runs; run++) {
  for (const [log, cmdline] of Object.entries(cmdlines)) {
    for (const count of cpus) {
      for (const name of contenders) {
        const label = `${run === 0 ? 'warm-up' : `run ${run}/${runs}`}: ${name}, ${count} vCPU, ${log} log`
        try {
          boot += 1
          const result = await trial(...START[name](count, cmdline), {
            ...{ marker, timeout, inspect },
            onStart: () => tell('start', boot),
            onMarker: () => tell('init', boot),
          })
          if (run > 0) samples.push({ name, cpus: count, log, run, boot, ...result })
          process.stderr.write(`${label}: ${(result.wallMs / 1000).toFixed(2)} s\n`)
        } catch (error) {
          process.stderr.write(`${label}: failed: ${error.message}\n`)
          if (run > 0) samples.push({ name, cpus: count, log, run, error: error.message })
        }
      }
    }
  }
}
process.stdout.write(`${JSON.stringify(samples)}\n`)

// How those that are compared start a machine: a program and its arguments, the guest's serial console on its stdin and stdout.
import { fileURLToPath } from 'node:url'
import { Failure, output } from '../../scripts/lib/run.mjs'

/** Skep in Node, from a configuration (bench/lib/skep-boot.mjs). */
export const skep = (config) => [
  process.execPath,
  [fileURLToPath(new URL('skep-boot.mjs', import.meta.url)), JSON.stringify(config)],
]

/** QEMU's TCG with a thread for each vCPU, and no devices but one serial port and what the machine q35 always has. */
export const qemuTcg = ({ qemu, cpu, cpus, memory, kernel, initrd, cmdline }) => [
  qemu,
  [
    ...['-accel', 'tcg,thread=multi', '-machine', 'q35', '-cpu', cpu, '-smp', `${cpus}`, '-m', memory],
    ...['-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot', '-serial', 'stdio'],
    ...['-kernel', kernel, '-initrd', initrd, '-append', cmdline],
  ],
]

/** QEMU's version, in one line. */
export async function qemuVersion(qemu) {
  const version = await output(qemu, ['--version'])
  if (!version) throw new Failure(`${qemu} is missing: sudo apt install qemu-system-x86`)
  return version.split('\n')[0]
}

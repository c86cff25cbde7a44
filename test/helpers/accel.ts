/**
 * What runs the processors of the tests' guests. `npm test` takes the software CPU; `npm run test:kvm` sets
 * `SKEP_TEST_ACCEL=kvm`, and the same tests run under KVM. Which engine the software CPU has is up to `SKEP_ENGINE`, which
 * every machine and every `skep` looks at whose configuration names none.
 *
 * @module
 */
import type { VcpuStats, VmConfig } from '../../dist/index.js'

const chosen = process.env['SKEP_TEST_ACCEL'] || 'software'
if (chosen !== 'software' && chosen !== 'kvm') throw new Error(`SKEP_TEST_ACCEL=${chosen}: software or kvm is wanted`)

/** For a machine's configuration. */
export const accel: 'software' | 'kvm' = chosen

/** In an emulated host, whose processor has faults of its own (docs/testing.md). */
export const inL1 = accel === 'kvm' && process.env['SKEP_L1'] !== undefined

/**
 * What limits of time are multiplied by: code runs ten times slower in L1, and L1 slower still where other programs want
 * the same processors. Nothing waits that long when all is well.
 */
export const patience = inL1 ? 5 : 1

/**
 * The processor of guests whose kernel must find nothing to complain about. QEMU's emulation of SVM lets a guest set XCR0 behind KVM's
 * back, whereupon Linux finds XSAVE inconsistent: in L1 they have none.
 */
export const soundCpu: Pick<VmConfig, 'cpu'> = inL1 ? { cpu: 'x86-64-v2' } : {}

/** For the command. */
export const accelArgs: readonly string[] = ['--accel', accel]

/**
 * A count that grows only while a vCPU runs: KVM counts no instructions, but every exit from the guest; the JIT counts those
 * that it leaves to the interpreter.
 */
export function progress(vcpu: VcpuStats): number {
  return accel === 'kvm' ? (vcpu.kernel['exits'] ?? 0) : vcpu.instructions
}

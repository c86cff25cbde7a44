/**
 * What runs the processors of the tests' guests. `npm test` takes the software CPU; `npm run test:kvm` sets
 * `SKEP_TEST_ACCEL=kvm`, and the same tests run under KVM.
 *
 * @module
 */
import type { VcpuStats } from '../../dist/index.js'

const chosen = process.env['SKEP_TEST_ACCEL'] || 'software'
if (chosen !== 'software' && chosen !== 'kvm') throw new Error(`SKEP_TEST_ACCEL=${chosen}: software or kvm is wanted`)

/** For a machine's configuration. */
export const accel: 'software' | 'kvm' = chosen

/** For the command. */
export const accelArgs: readonly string[] = ['--accel', accel]

/** A count that grows while a vCPU runs and only then: KVM counts no instructions, but every exit from the guest. */
export function progress(vcpu: VcpuStats): number {
  return accel === 'kvm' ? (vcpu.kernel['exits'] ?? 0) : vcpu.instructions
}

// Whether this machine's own KVM runs guests at the processor's speed.
import { accessSync, constants, readFileSync } from 'node:fs'

/**
 * As `skep doctor` sees it: the processor must have VT-x or SVM. Without them /dev/kvm may still be there, of the
 * paravirtual kind, which interprets unmodified guests.
 * @returns {{ usable: boolean, reason: string }}
 */
export function hardwareKvm() {
  const flags =
    readFileSync('/proc/cpuinfo', 'utf8')
      .match(/^flags\s*:(.*)$/m)?.[1]
      .split(/\s+/) ?? []
  const feature = { vmx: 'VT-x', svm: 'SVM' }[flags.find((flag) => flag === 'vmx' || flag === 'svm')]
  if (!feature) return { usable: false, reason: 'this processor offers neither VT-x nor SVM' }
  try {
    accessSync('/dev/kvm', constants.R_OK | constants.W_OK)
  } catch (error) {
    const why =
      error.code === 'ENOENT' ? 'there is no /dev/kvm' : 'this user may not open /dev/kvm (join the group kvm)'
    return { usable: false, reason: `this processor offers ${feature}, but ${why}` }
  }
  return { usable: true, reason: `this processor offers ${feature}` }
}

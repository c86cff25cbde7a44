import { expect, describe as group, test } from 'vitest'
import { describe } from '../../ts/src/cli/commands/doctor.js'
import { type Diagnosis, diagnose } from '../../ts/src/doctor.js'
import { errorTable } from '../../ts/src/errors.js'

const base: Diagnosis = {
  cpu: { vendor: 'AuthenticAMD', model: 'EPYC', features: { svm: true, npt: true } },
  kvm: { present: true, openable: true, apiVersion: 12, paravirtual: false, usable: true },
  guests: [],
  accelerator: { auto: 'kvm', reason: 'this CPU offers SVM, and /dev/kvm can be used' },
  engine: { auto: 'jit', reason: 'it is quick' },
  host: { kernel: '6.18', cpus: 2, memoryBytes: 2 ** 34 },
  limits: { memlockBytes: 8 * 2 ** 20, openFiles: null },
}

function lines(kvm: Partial<Diagnosis['kvm']>, rest: Partial<Diagnosis> = {}): Record<string, string> {
  const described = describe({ ...base, ...rest, kvm: { ...base.kvm, ...kvm } })
  return Object.fromEntries(described.map(([key, ...texts]) => [key, texts.join(' | ')]))
}

group('the doctor', () => {
  test('shows a host with everything', () => {
    expect(lines({})).toMatchObject({
      host: 'Linux 6.18, x86-64, 2 CPUs, 16.0 GiB',
      virtualization: 'AMD-V (nested paging yes)',
      '/dev/kvm': 'present, API version 12, has all that is needed',
      accelerator: 'kvm (auto): this CPU offers SVM, and /dev/kvm can be used | choose with --accel kvm|software',
      engine: 'jit (auto, with the software CPU): it is quick | choose with --engine jit|interpreter|lockstep',
      limits: 'memlock: 8.0 MiB | open files: none',
    })
  })

  test('says that a paravirtual KVM is passed over, and how to force it', () => {
    const cpu = { ...base.cpu, features: { hypervisor: true } }
    const told = lines({ paravirtual: true }, { cpu })
    expect(told['/dev/kvm']).toMatch(/^present, paravirtual \(PVM\): .*→ not used \| forced with --accel kvm$/)
    expect(told['virtualization']).toBe('none: this CPU offers neither VT-x nor SVM (it is itself a virtual machine)')
  })

  test('shows what stands in the way of KVM as it is told', () => {
    const error = '/dev/kvm exists but may not be opened: add yourself to group kvm'
    const closed = { openable: false, usable: false, code: 'ERR_KVM_PERMISSION' as const, error }
    expect(lines(closed)['/dev/kvm']).toBe(error)
    expect(lines({ ...closed, paravirtual: true })['/dev/kvm']).toBe(error)
    expect(lines({ present: false, openable: false, usable: false })['/dev/kvm']).toBe('not there')
  })

  test('looks at this host', () => {
    const { kvm, accelerator, engine, cpu } = diagnose()
    expect(typeof cpu.features['hypervisor']).toBe('boolean')
    expect(accelerator.auto === 'software' || kvm.usable).toBe(true)
    expect(engine).toMatchObject({ auto: 'jit' })
    expect(accelerator.reason).not.toContain('this version')
    if (kvm.usable) expect(kvm).not.toHaveProperty('error')
    else expect(errorTable).toHaveProperty(kvm.code ?? '')
  })
})

/**
 * What this host offers to a hypervisor.
 *
 * @module
 */
import type { CpuFeature, CpuModel } from './config/cpu.js'
import { defaultEngine } from './config/engine.js'
import type { Engine } from './config/types.js'
import type { CodeOf } from './errors.js'
import { crossingSync, native } from './native.js'

/** What there is, as of {@link diagnose}. */
export interface Diagnosis {
  /** The processor. */
  cpu: {
    /** `GenuineIntel`, `AuthenticAMD`, ... */
    vendor: string
    /** The name it gives itself. */
    model: string
    /** Parts of hardware virtualization: `vmx` (VT-x), `svm` (AMD-V), `ept`, `unrestrictedGuest`, `npt`;
     * and `hypervisor`: the host is itself a virtual machine. */
    features: Record<string, boolean>
  }
  /** Linux's KVM. */
  kvm: {
    /** Whether /dev/kvm is there. */
    present: boolean
    /** Whether this user may open it. */
    openable: boolean
    /** Version of its interface; 12 for ever. */
    apiVersion?: number
    /** Whether it is there although the processor has neither VT-x nor SVM: it would interpret unmodified guests. */
    paravirtual: boolean
    /** Whether machines can run on it: with `accel: 'kvm'`, and with `'auto'` unless it is paravirtual. */
    usable: boolean
    /** What stands in the way, as the code of the error that `accel: 'kvm'` gives. */
    code?: Extract<CodeOf<'HostError'>, `ERR_KVM_${string}`>
    /** What stands in the way, with a remedy. */
    error?: string
  }
  /** What processors guests can have, for each way of running them. */
  guests: {
    /** The way: `software`, `kvm`. */
    backEnd: string
    /** All models, and whether they can be had here; if not, why. */
    models: { name: CpuModel; available: boolean; reason?: string }[]
    /** All features by name, and whether they can be had here. */
    features: Record<CpuFeature, boolean>
  }[]
  /** What runs the processors. */
  accelerator: {
    /** What `accel: 'auto'` picks here. */
    auto: 'software' | 'kvm'
    /** Why, one sentence. */
    reason: string
  }
  /** What executes guest instructions where software runs the processors. */
  engine: {
    /** What `engine: 'auto'` is here. */
    auto: Engine
    /** Why, one sentence. */
    reason: string
  }
  /** The host. */
  host: {
    /** Its kernel. */
    kernel: string
    /** Its processors. */
    cpus: number
    /** Its memory in bytes. */
    memoryBytes: number
  }
  /** Limits on what this user's machines may be, by name; `null` is none. */
  limits: Record<string, number | string | boolean | null>
}

/**
 * Looks at the host and leaves nothing behind.
 *
 * @throws NativeBindingError if the compiled part is missing.
 * @throws ConfigError `ERR_CONFIG_ENGINE` if `SKEP_ENGINE` in the environment is no engine.
 */
export function diagnose(): Diagnosis {
  const probe = JSON.parse(crossingSync(() => native().probe())) as Omit<Diagnosis, 'engine'>
  return { ...probe, engine: defaultEngine() }
}

/** The part of {@link diagnose} that the choice of an accelerator needs: quick, as every machine asks it. */
export function diagnoseAccelerator(): Pick<Diagnosis, 'accelerator' | 'kvm'> {
  return JSON.parse(crossingSync(() => native().accelerator())) as Pick<Diagnosis, 'accelerator' | 'kvm'>
}

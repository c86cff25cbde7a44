/**
 * What a person writes ({@link VmConfig}), and what it is resolved into ({@link MachineSpec}).
 *
 * @module
 */
import type { CpuFeature, CpuModel } from './cpu.js'
import type { Size } from './size.js'

/**
 * A machine, as plain JSON. Only {@link VmConfig.boot} is required. A {@link MachineSpec} is a `VmConfig` too: what
 * `skep run --print-config` prints can be run again.
 *
 * @example
 * ```ts
 * const config = defineVm({
 *   name: 'web1',
 *   cpus: 2,
 *   memory: '512M',
 *   boot: { kernel: 'vmlinuz', initrd: 'initrd', cmdline: 'console=ttyS0' },
 * })
 * ```
 */
export interface VmConfig {
  /** Version of the form; 1. */
  version?: 1 | undefined
  /** Name, for people and for SMBIOS: 1 to 255 bytes without control characters. Default `'vm'`. */
  name?: string | undefined
  /** UUID for SMBIOS. Default: made of the name, the same each time. */
  uuid?: string | undefined
  /** Number of processors, 1 to 64, or their topology. Default 1. */
  cpus?: number | CpuTopology | undefined
  /**
   * The processor that the guest sees: a model, or a model and features on and off by name. Default `'host'`, all that
   * there is here; with a named model the guest sees the same on every host, and can move between them.
   */
  cpu?: CpuModel | CpuConfig | undefined
  /** Memory, 2 MiB to 16 TiB in steps of 1 MiB. Default `'256M'`. */
  memory?: Size | MemoryConfig | undefined
  /**
   * What runs the processors. Default `'auto'`: KVM where the host's processor has VT-x or SVM and /dev/kvm can be used, else
   * the software CPU. `'kvm'` takes KVM even where it is paravirtual.
   */
  accel?: Accelerator | undefined
  /**
   * The engine of the software CPU. Default `'auto'`: what `SKEP_ENGINE` in the environment says, else `'jit'`. Naming one
   * makes `accel` `'auto'` the software CPU; `null` is none, with KVM.
   */
  engine?: Engine | 'auto' | null | undefined
  /** What leaves the guest, and so what a guest that waits does to the host's processors. */
  exits?: ExitsConfig | undefined
  /** What is booted. */
  boot: BootConfig
  /** Devices by slot. */
  devices?: DevicesConfig | undefined
  /**
   * Whether port 0xf4 ends the machine with the status `(value << 1) | 1`, as the device `isa-debug-exit` of QEMU does.
   * Default `false`.
   */
  debugExit?: boolean | undefined
  /** What the real-time clock shows. Default `'utc'`. */
  rtc?: 'utc' | 'localtime' | undefined
  /** Whether a guest that reboots starts again or ends the machine with status 0. Default `'restart'`. */
  onReboot?: 'restart' | 'exit' | undefined
}

/** Ways of running processors. */
export type Accelerator = 'auto' | 'software' | 'kvm'

/**
 * Engines of the software CPU: the JIT (with the interpreter for what is not worth a translation), the interpreter alone,
 * and, for diagnosis, both, compared block by block; the last runs one processor only, and slowly.
 */
export type Engine = 'jit' | 'interpreter' | 'lockstep'

/** Processors: the product of sockets, cores and threads is their number, 1 to 64. */
export interface CpuTopology {
  /** Packages. Default 1. */
  sockets?: number | undefined
  /** Cores in a package. Default 1. */
  cores?: number | undefined
  /** Threads of a core. Default 1. */
  threads?: number | undefined
  /**
   * The host's CPUs that a processor may run on, by its number: `{ 0: 2, 1: [2, 3] }`. Those that are not named run where
   * this process may. Default: none is named.
   */
  pin?: Record<string, number | number[]> | undefined
}

/**
 * A processor.
 *
 * @example
 * ```ts
 * cpu: { model: 'x86-64-v2', features: { aes: true } }
 * ```
 */
export interface CpuConfig {
  /** What it starts from. Default `'host'`. */
  model?: CpuModel | undefined
  /** Features on and off, on top of the model. */
  features?: CpuFeatures | undefined
}

/** Features by name, and whether they are on. */
export type CpuFeatures = { [name in CpuFeature]?: boolean | undefined }

/** Guest memory. */
export interface MemoryConfig {
  /** How much. Default `'256M'`. */
  size?: Size | undefined
  /** Whether all of it is taken when the machine is created and never paged out (RLIMIT_MEMLOCK counts). Default `false`. */
  wired?: boolean | undefined
  /** Larger pages of the host's. Default `'auto'`. */
  hugePages?: HugePages | undefined
}

/**
 * Pages of the host that back guest memory: `'auto'` are transparent huge pages (2 MiB) where the host's settings give this
 * machine some, else small ones (4 KiB); `false` are small ones; `'thp'` are transparent ones, or an error; `'2M'` and `'1G'` come from the host's pool of huge pages, all at once when the machine is
 * created.
 */
export type HugePages = 'auto' | false | 'thp' | '2M' | '1G'

/** What leaves the guest. The software CPU yields whenever a processor halts, whatever is said here. */
export interface ExitsConfig {
  /**
   * Whether HLT leaves the guest, so that the host's CPU can do other work. Without it a halted processor keeps its host CPU
   * to itself, and interrupts reach it sooner. Default `true`.
   */
  hlt?: boolean | undefined
  /** Whether a loop of PAUSE leaves the guest, so that the processor it waits for can run. Default `true`. */
  pause?: boolean | undefined
  /** For how long a halted processor polls before its thread sleeps: nanoseconds, at most 10^9. Default `null`, as the host does. */
  haltPoll?: number | null | undefined
}

/** What is booted: a kernel, loaded directly, or the firmware in a ROM. */
export type BootConfig = KernelBoot | RomBoot

/** A kernel: Linux bzImage, ELF with a PVH note, or multiboot 1 image; which of them it is shows in the file. */
export interface KernelBoot {
  /** Tells the two kinds of boot apart where both could be meant. */
  kind?: 'kernel' | undefined
  /** The file. */
  kernel: string
  /** Initial RAM disk. */
  initrd?: string | null | undefined
  /** Command line. Default empty. */
  cmdline?: string | undefined
  /** Files handed to a multiboot or PVH kernel, at most 64. */
  modules?: BootModule[] | undefined
}

/** A file handed to the kernel, with a command line of its own. */
export interface BootModule {
  /** The file. */
  path: string
  /** Its command line. Default empty. */
  cmdline?: string | undefined
}

/** A flat firmware image whose end is at 4 GiB, at most 16 MiB. */
export interface RomBoot {
  /** Tells the two kinds of boot apart where both could be meant. */
  kind?: 'rom' | undefined
  /** The file. */
  rom: string
}

/**
 * Devices by slot, `bus:device:function`. In this version there is one: the LPC bridge with the four serial ports, in slot
 * 0:31:0, which is there without being named, too.
 */
export interface DevicesConfig {
  /** The LPC bridge. */
  '0:31:0'?: LpcConfig | undefined
}

/** The LPC bridge and its serial ports. */
export interface LpcConfig {
  /** The kind of device. */
  type: 'lpc'
  /** Port 0x3f8, IRQ 4, Linux's `ttyS0`. Default `'console'`. */
  com1?: SerialConfig | undefined
  /** Port 0x2f8, IRQ 3, Linux's `ttyS1`. Default `'none'`. */
  com2?: SerialConfig | undefined
  /** Port 0x3e8, IRQ 4. Default `'none'`. */
  com3?: SerialConfig | undefined
  /** Port 0x2e8, IRQ 3. Default `'none'`. */
  com4?: SerialConfig | undefined
}

/**
 * What a serial port is attached to: `'console'` is a console of the API, {@link Vm.console}; `'stdio'` is the same, and
 * tells `skep run` to attach that one to the terminal; `'file:PATH'` is a file that takes the output, emptied at the start;
 * `'none'` drops the output.
 */
export type SerialConfig = 'console' | 'stdio' | 'none' | `file:${string}` | Serial

/** What a serial port is attached to, resolved. */
export type Serial = { kind: 'console' } | { kind: 'file'; path: string } | { kind: 'none' }

/** A machine in which every slot and every default is explicit: what the engine builds, and what a snapshot stores. */
export interface MachineSpec {
  /** Version of the form. */
  version: 1
  /** Name. */
  name: string
  /** UUID in its canonical form. */
  uuid: string
  /** Processors. */
  cpus: { sockets: number; cores: number; threads: number; pin: Record<string, number[]> }
  /** What CPUID shows. */
  cpu: { model: CpuModel; features: CpuFeatures }
  /** Memory: bytes, a multiple of 1 MiB, and how the host backs it. */
  memory: { size: number; wired: boolean; hugePages: HugePages }
  /** What runs the processors. */
  accel: 'software' | 'kvm'
  /** The engine of the software CPU; `null` with KVM. */
  engine: Engine | null
  /** What leaves the guest; times in nanoseconds. */
  exits: { hlt: boolean; pause: boolean; haltPoll: number | null }
  /** What is booted; paths are absolute. */
  boot:
    | {
        kind: 'kernel'
        kernel: string
        initrd: string | null
        cmdline: string
        modules: { path: string; cmdline: string }[]
      }
    | { kind: 'rom'; rom: string }
  /** Devices by slot. */
  devices: { '0:31:0': { type: 'lpc'; com1: Serial; com2: Serial; com3: Serial; com4: Serial } }
  /** Whether the debug-exit port exists. */
  debugExit: boolean
  /** What the real-time clock shows. */
  rtc: 'utc' | 'localtime'
  /** What a guest's reboot does. */
  onReboot: 'restart' | 'exit'
}

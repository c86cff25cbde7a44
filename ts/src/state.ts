/**
 * A machine from inside: registers, memory, counters.
 *
 * @module
 */
import type { Engine } from './config/types.js'
import { ArgumentError } from './errors.js'
import { crossing, type NativeMachine } from './native.js'
import { type Abortable, abortable } from './signal.js'

/** A segment register with its hidden part, SDM vol. 3A §3.4.3. */
export interface SegmentRegister {
  /** The visible selector, 16 bits. */
  selector: number
  /** Linear address at which the segment begins. */
  base: bigint
  /** Last offset in the segment, 32 bits, in bytes. */
  limit: number
  /** Access rights in the layout of VMX, SDM vol. 3C §25.4.1. */
  access: number
}

/** GDTR or IDTR. */
export interface TableRegister {
  /** Linear address of the table. */
  base: bigint
  /** Last offset in the table, 16 bits, in bytes. */
  limit: number
}

/** The registers of a processor. 64-bit ones are bigints. */
export interface Registers
  extends Record<
    | 'rax'
    | 'rbx'
    | 'rcx'
    | 'rdx'
    | 'rsi'
    | 'rdi'
    | 'rsp'
    | 'rbp'
    | 'r8'
    | 'r9'
    | 'r10'
    | 'r11'
    | 'r12'
    | 'r13'
    | 'r14'
    | 'r15'
    | 'rip'
    | 'rflags'
    | 'cr0'
    | 'cr2'
    | 'cr3'
    | 'cr4'
    | 'cr8'
    | 'xcr0'
    | 'efer'
    | 'apicBase',
    bigint
  > {
  cs: SegmentRegister
  ds: SegmentRegister
  es: SegmentRegister
  fs: SegmentRegister
  gs: SegmentRegister
  ss: SegmentRegister
  tr: SegmentRegister
  ldtr: SegmentRegister
  gdtr: TableRegister
  idtr: TableRegister
}

/** What a processor has done. Counts start with the machine. */
export interface VcpuStats {
  /** Number of the processor. */
  vcpu: number
  /** Instructions that the interpreter has retired: those that run translated are not counted, nor are any under KVM. */
  instructions: number
  /** Port reads and writes. */
  portIo: number
  /** Memory-mapped reads and writes. */
  memoryIo: number
  /** Interrupts delivered, NMIs included. */
  interrupts: number
  /** Exceptions delivered. */
  exceptions: number
  /** Times it halted. */
  halts: number
  /** Time it was halted, in nanoseconds. */
  haltedNs: number
  /** Blocks of guest code decoded for the interpreter. */
  blocks: number
  /** Misses of the software TLB. */
  tlbMisses: number
  /** What the software CPU's JIT has translated; all 0 where there is none. */
  translations: TranslationStats
  /** Instructions that KVM could not execute and the software CPU's interpreter did. */
  emulated: number
  /** Returns from the guest to this process, by reason; empty under the software CPU, where the guest runs inside of it. */
  exits: Record<string, number>
  /** What the host's kernel has counted of this processor, under its own names; empty where it does not. */
  kernel: Record<string, number>
}

/** What the JIT of the software CPU has translated. */
export interface TranslationStats {
  /** Blocks of guest code, counted anew when they are translated anew. */
  blocks: number
  /** Guest instructions in them. */
  instructions: number
  /** Bytes of host code made of them. */
  bytes: number
  /** Times the oldest eighth of the cache of host code was dropped to make room. */
  evictions: number
}

/** What a device has been asked for. */
export interface DeviceStats {
  /** Its name, such as `com1`. */
  name: string
  /** Register reads by processors. */
  reads: number
  /** Register writes by processors. */
  writes: number
}

/** What a machine has done. */
export interface VmStats {
  /** The engine of the software CPU; `null` with KVM. */
  engine: Engine | null
  /** What has been translated for all processors. */
  translations: TranslationStats
  /** By processor. */
  vcpus: VcpuStats[]
  /** By device. */
  devices: DeviceStats[]
}

/** One processor of a machine, from {@link Vm.vcpu}. */
export class Vcpu {
  /** Its number, from 0; its APIC ID. */
  readonly index: number
  readonly #native: () => NativeMachine

  /** @internal */
  constructor(index: number, native: () => NativeMachine) {
    this.index = index
    this.#native = native
  }

  /**
   * Its registers. While it does not run: in the states `'created'`, `'paused'` and `'stopped'`.
   *
   * @throws StateError `ERR_VM_STATE` while it runs.
   */
  async registers(options: Abortable = {}): Promise<Registers> {
    const json = await abortable(
      crossing(() => this.#native().registers(this.index)),
      options.signal,
    )
    return JSON.parse(json, (_, value) => (isHex(value) ? BigInt(value) : value)) as Registers
  }

  /**
   * Sets those registers that are named, while it does not run.
   *
   * @throws ArgumentError `ERR_REGISTERS` if one does not exist or takes no such value; none is set then.
   * @throws StateError `ERR_VM_STATE` while it runs.
   */
  async setRegisters(registers: Partial<Registers>, options: Abortable = {}): Promise<void> {
    const json = JSON.stringify(registers, (_, value) => {
      if (typeof value !== 'bigint') return value
      if (value < 0n || value > 0xffff_ffff_ffff_ffffn) {
        throw new ArgumentError('ERR_REGISTERS', `a register holds 0 to 2^64-1, not ${value}`)
      }
      return `0x${value.toString(16)}`
    })
    await abortable(
      crossing(() => this.#native().setRegisters(this.index, json)),
      options.signal,
    )
  }
}

/** Guest memory by guest physical address, {@link Vm.memory}. In every state; a running guest may write at the same time. */
export class GuestMemory {
  readonly #native: () => NativeMachine

  /** @internal */
  constructor(native: () => NativeMachine) {
    this.#native = native
  }

  /**
   * Copies `length` bytes from `address`.
   *
   * @throws ArgumentError `ERR_MEMORY_RANGE` if not all of them are memory, `ERR_MEMORY_LENGTH` for more than one call moves.
   */
  async read(address: bigint | number, length: number, options: Abortable = {}): Promise<Buffer> {
    if (!Number.isSafeInteger(length) || length < 0 || length > 0xffff_ffff) {
      throw new ArgumentError('ERR_ARGUMENT', `length: expected a number of bytes, got ${length}`)
    }
    const gpa = addressOf(address)
    return await abortable(
      crossing(() => this.#native().readMemory(gpa, length)),
      options.signal,
    )
  }

  /**
   * Copies `data` to `address`.
   *
   * @throws ArgumentError `ERR_MEMORY_RANGE` if not all of it is memory, `ERR_MEMORY_READ_ONLY` if some of it is a ROM,
   *   `ERR_MEMORY_LENGTH` for more than one call moves.
   */
  async write(address: bigint | number, data: Uint8Array, options: Abortable = {}): Promise<void> {
    const gpa = addressOf(address)
    const buffer = Buffer.from(data.buffer, data.byteOffset, data.byteLength)
    await abortable(
      crossing(() => this.#native().writeMemory(gpa, buffer)),
      options.signal,
    )
  }
}

function isHex(value: unknown): value is string {
  return typeof value === 'string' && /^0x[0-9a-f]+$/.test(value)
}

function addressOf(address: bigint | number): bigint {
  const valid =
    typeof address === 'bigint' ? address >= 0n && address < 1n << 64n : Number.isSafeInteger(address) && address >= 0
  if (!valid) throw new ArgumentError('ERR_ARGUMENT', `address: expected a guest physical address, got ${address}`)
  return BigInt(address)
}

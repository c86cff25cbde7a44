/**
 * Skep: a hypervisor that a program embeds.
 *
 * {@link Vm} is the machine, {@link VmConfig} what it is described by, {@link prepareImage} something to boot.
 *
 * @module skep
 */
export { type CpuFeature, type CpuModel, cpuFeatures, cpuModels } from './config/cpu.js'
export { loadConfig } from './config/load.js'
export { defineVm, type ResolveOptions, resolve } from './config/resolve.js'
export { configJsonSchema } from './config/schema.js'
export { formatSize, parseSize, type Size, type SizeSuffix } from './config/size.js'
export type {
  Accelerator,
  BootConfig,
  BootModule,
  CpuConfig,
  CpuFeatures,
  CpuTopology,
  DevicesConfig,
  Engine,
  ExitsConfig,
  HugePages,
  KernelBoot,
  LpcConfig,
  MachineSpec,
  MemoryConfig,
  RomBoot,
  Serial,
  SerialConfig,
  VmConfig,
} from './config/types.js'
export { validate } from './config/validate.js'
export { Console, type LinesOptions, type WaitForOptions } from './console.js'
export { type Diagnosis, diagnose } from './doctor.js'
export {
  ArgumentError,
  BootError,
  type CodeOf,
  ConfigError,
  type ConfigIssue,
  ConsoleError,
  type ErrorClass,
  type ErrorCode,
  type ErrorEntry,
  type ErrorInit,
  errorTable,
  HostError,
  ImageError,
  InternalError,
  isSkepError,
  NativeBindingError,
  SkepError,
  StateError,
} from './errors.js'
export type {
  EmulatedEvent,
  ExitEvent,
  ExitReason,
  LostEvent,
  ResetEvent,
  SerialErrorEvent,
  StateEvent,
  VmEvent,
  VmEventMap,
  VmExit,
  VmState,
} from './events.js'
export type { ConsoleMatch } from './expect.js'
export type { Progress } from './images/apt.js'
export {
  defaultImage,
  findImage,
  type Image,
  type ImageInfo,
  listImages,
  type PrepareOptions,
  prepareImage,
  removeImage,
} from './images/index.js'
export { buildInitramfs, type InitramfsEntry, type InitramfsOptions, writeInitramfs } from './images/initramfs.js'
export type { Abortable } from './signal.js'
export {
  type DeviceStats,
  GuestMemory,
  type Registers,
  type SegmentRegister,
  type TableRegister,
  type TranslationStats,
  Vcpu,
  type VcpuStats,
  type VmStats,
} from './state.js'
export { type CreateOptions, type RunOptions, Vm } from './vm.js'

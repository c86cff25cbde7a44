/**
 * Errors: one base class, one table of codes. `docs/errors.md` is written from the same table.
 *
 * @module
 */

/** What the table says about a code. */
export interface ErrorEntry {
  /** The class that carries the code. */
  readonly class: ErrorClass
  /** What has happened. */
  readonly meaning: string
  /** What to do about it. */
  readonly remedy: string
}

/** Names of the classes of errors. */
export type ErrorClass =
  | 'ConfigError'
  | 'BootError'
  | 'StateError'
  | 'ArgumentError'
  | 'HostError'
  | 'ConsoleError'
  | 'ImageError'
  | 'NativeBindingError'
  | 'InternalError'

function entry<const C extends ErrorClass>(
  errorClass: C,
  meaning: string,
  remedy: string,
): { readonly class: C; readonly meaning: string; readonly remedy: string } {
  return { class: errorClass, meaning, remedy }
}

/** Files that a guest is loaded from. */
const roles = { KERNEL: 'kernel', INITRD: 'initial RAM disk', MODULE: 'boot module', ROM: 'ROM' } as const
/** What can be wrong with one, and what to do about it. */
const faults = {
  MISSING: ['does not exist', 'Check the path.'],
  IS_DIRECTORY: ['is a directory', 'Name the file in it.'],
  NOT_A_FILE: ['is a device, pipe or socket', 'Copy its contents to a file and name that.'],
  PERMISSION: ['may not be read by this user', 'Give it read permission.'],
  READ: ['cannot be read', "The message has the system's reason."],
  EMPTY: ['has no bytes', 'See whether it was downloaded or built completely.'],
  TRUNCATED: ['ends before what its header promises', 'Fetch or build it again.'],
  FORMAT: ['is of no known format, or broken', 'The message says what it looks like and what to give instead.'],
  MACHINE: ['is for another processor', 'Give one built for x86-64.'],
  PLACEMENT: ['wants an address that it cannot have', 'The message says which, and why not.'],
  TOO_LARGE: ['finds no room in guest memory', 'Give the machine more memory, or shrink the file.'],
} as const

type FileCode = `ERR_${keyof typeof roles}_${keyof typeof faults}`

const fileErrors = Object.fromEntries(
  Object.entries(roles).flatMap(([role, name]) =>
    Object.entries(faults).map(([fault, [meaning, remedy]]) => [
      `ERR_${role}_${fault}`,
      entry('BootError', `The ${name} ${meaning}.`, remedy),
    ]),
  ),
) as Readonly<Record<FileCode, ReturnType<typeof entry<'BootError'>>>>

const table = {
  // Configuration, as TypeScript checks it.
  ERR_CONFIG_UNKNOWN: entry(
    'ConfigError',
    'The configuration has an option that does not exist.',
    'Correct its name; the message names the nearest known one.',
  ),
  ERR_CONFIG_MISSING: entry('ConfigError', 'A required option is not there.', 'Add it.'),
  ERR_CONFIG_INVALID: entry(
    'ConfigError',
    'The value of an option has the wrong type or is not one of its values.',
    'Give it a value that the message names.',
  ),
  ERR_CONFIG_CPUS: entry(
    'ConfigError',
    'The number of processors or the product of the topology is not 1 to 64, or what is pinned cannot be.',
    'Give 1 to 64 processors, and pin those to numbers of host CPUs.',
  ),
  ERR_CONFIG_CPU: entry(
    'ConfigError',
    'The processor is of no known model, or a feature is neither on nor off.',
    'Give a model that the message names; features are true or false.',
  ),
  ERR_CONFIG_ENGINE: entry(
    'ConfigError',
    'The engine of the software CPU does not exist, contradicts accel, or cannot run that many processors.',
    'Give jit or interpreter, and none with KVM; lockstep takes one processor. The environment variable SKEP_ENGINE counts too.',
  ),
  ERR_CONFIG_MEMORY: entry(
    'ConfigError',
    'The memory size is not a size, not a multiple of 1 MiB, or out of range, or what backs it is unknown.',
    'Give a number of bytes or a size such as 512M or 2G, from 2M to 16T; hugePages is auto, false, thp, 2M or 1G.',
  ),
  ERR_CONFIG_SERIAL: entry(
    'ConfigError',
    'A serial port is attached to something that does not exist, or two to the same thing.',
    'Use console, stdio, none or file:PATH, a different file for each port.',
  ),
  ERR_CONFIG_SLOT: entry(
    'ConfigError',
    'A device slot is not written bus:device:function, or the device cannot sit there.',
    'In this version the only device is lpc, in slot 0:31:0.',
  ),
  ERR_CONFIG_UNSUPPORTED: entry(
    'ConfigError',
    'The option belongs to a part that this version does not have.',
    'Leave it out, or wait for a version that has it.',
  ),
  ERR_CONFIG_FILE: entry(
    'ConfigError',
    'A configuration file cannot be read or is not JSON.',
    'Give a readable JSON file; the message says where it breaks off.',
  ),
  ERR_CONFIG_VERSION: entry(
    'ConfigError',
    'The specification was written by another version.',
    'Write the configuration anew, or use the version of skep that wrote it.',
  ),

  // The specification, as the engine checks it again.
  ERR_SPEC_JSON: entry(
    'ConfigError',
    'The engine cannot read the machine specification.',
    'Reinstall: the TypeScript part and the addon are of different versions.',
  ),
  ERR_SPEC_VERSION: entry(
    'ConfigError',
    'The engine reads another version of the machine specification.',
    'Reinstall: the TypeScript part and the addon are of different versions.',
  ),
  ERR_SPEC_NAME: entry(
    'ConfigError',
    'The name is empty, too long or has control characters.',
    'Use 1 to 255 bytes of text.',
  ),
  ERR_SPEC_UUID: entry(
    'ConfigError',
    'The UUID is not in its canonical form.',
    'Write it as 01234567-89ab-cdef-0123-456789abcdef.',
  ),
  ERR_CPU_FEATURE_UNKNOWN: entry(
    'ConfigError',
    'There is no processor feature of that name.',
    'Correct it; skep doctor --json has all names.',
  ),
  ERR_CPU_FEATURE_FIXED: entry(
    'ConfigError',
    'A processor feature cannot be set, because every processor has it or it follows from something else.',
    'Leave it out.',
  ),
  ERR_CPU_FEATURE_NEEDS: entry(
    'ConfigError',
    'A processor feature was turned on without those that it needs.',
    'Turn on what the message names, or choose a model that has it.',
  ),
  ERR_CPU_FEATURE_NEEDED: entry(
    'ConfigError',
    'A processor feature was turned off that others need.',
    'Turn off those too that the message names.',
  ),
  ERR_SPEC_CPUS: entry(
    'ConfigError',
    'The number of processors is out of range, or one that is pinned is.',
    'Give 1 to 64 processors, and pin no others.',
  ),
  ERR_SPEC_ENGINE: entry(
    'ConfigError',
    'An engine is given with KVM, none with the software CPU, or lockstep with more than one processor.',
    'Leave engine out, or give lockstep one processor.',
  ),
  ERR_SPEC_EXITS: entry('ConfigError', 'A halted processor would poll for too long.', 'Give at most 10^9 nanoseconds.'),
  ERR_SPEC_MEMORY: entry(
    'ConfigError',
    'The memory size is out of range or not a multiple of 1 MiB.',
    'Give 2M to 16T.',
  ),
  ERR_SPEC_TEXT: entry(
    'ConfigError',
    'A path or command line is too long or holds a NUL.',
    'Use at most 65,536 bytes without NUL.',
  ),
  ERR_SPEC_PATH: entry('ConfigError', 'A path is empty, or in use twice.', 'Name a file of its own.'),
  ERR_SPEC_MODULES: entry('ConfigError', 'There are too many boot modules.', 'Give at most 64.'),
  ERR_SPEC_SLOT: entry(
    'ConfigError',
    'A device is in a slot where the machine has none, or is missing.',
    'In this version the only device is lpc, in slot 0:31:0.',
  ),

  // The machine.
  ERR_VM_STATE: entry(
    'StateError',
    'The call does not fit the state the machine is in.',
    'Check vm.state first; the message says which state it was and which it must be.',
  ),
  ERR_VM_DESTROYED: entry(
    'StateError',
    'The machine has been disposed of.',
    'Create a new one; nothing of this one is left.',
  ),
  ERR_MEMORY_RANGE: entry(
    'ArgumentError',
    'The range is not all guest memory.',
    'Stay within memory; the 3-4 GiB window belongs to devices.',
  ),
  ERR_MEMORY_READ_ONLY: entry('ArgumentError', 'The range is read-only memory.', 'Write to other memory.'),
  ERR_MEMORY_LENGTH: entry('ArgumentError', 'One call moves only so much memory.', 'Split the access.'),
  ERR_VCPU_INDEX: entry('ArgumentError', 'There is no such processor.', 'Processors are numbered from 0.'),
  ERR_REGISTERS: entry(
    'ArgumentError',
    'A register does not exist, or takes no such value.',
    'Use the names and the widths that registers() shows.',
  ),
  ERR_CONSOLE_PORT: entry(
    'ArgumentError',
    'The machine has no console on that serial port.',
    'Ports are 1 to 4; give the port the value "console" in the configuration.',
  ),
  ERR_ARGUMENT: entry('ArgumentError', 'An argument has the wrong type or value.', 'Pass what the message names.'),

  // The host.
  ERR_MEMORY_HOST: entry(
    'HostError',
    'The host does not give that much memory.',
    'Lower memory, or raise the limit that stops it (ulimit -v, cgroup).',
  ),
  ERR_MEMORY_HUGE_PAGES: entry(
    'HostError',
    'The host has too few huge pages of that size, or none.',
    'Reserve as many as the message says, with the command that it names, or leave memory.hugePages out.',
  ),
  ERR_MEMORY_WIRED: entry(
    'HostError',
    'This process may not lock as much memory.',
    'Raise the limit (ulimit -l), give it CAP_IPC_LOCK, or leave memory.wired out.',
  ),
  ERR_CPU_AFFINITY: entry(
    'HostError',
    'A processor is pinned to a host CPU that does not exist or may not be used.',
    'Choose among those that the message names.',
  ),
  ERR_KVM_MISSING: entry(
    'HostError',
    'There is no /dev/kvm, or nothing behind it.',
    "Enable virtualization in the firmware's set-up and load the module kvm_intel or kvm_amd.",
  ),
  ERR_KVM_PERMISSION: entry(
    'HostError',
    '/dev/kvm exists but may not be opened.',
    'Add yourself to group kvm (sudo usermod -aG kvm $USER) and log in again.',
  ),
  ERR_KVM_VERSION: entry(
    'HostError',
    '/dev/kvm speaks another version of its interface than 12.',
    'Use Linux 2.6.22 or newer, or accel "software".',
  ),
  ERR_KVM_CAPABILITY: entry(
    'HostError',
    'KVM lacks something that every machine needs.',
    'Use a newer kernel (4.13 has it all), or accel "software".',
  ),
  ERR_KVM_DEVICE: entry(
    'HostError',
    '/dev/kvm cannot be opened, or does not answer.',
    'The message has the system\'s reason; accel "software" needs no KVM.',
  ),
  ERR_SERIAL_FILE: entry(
    'HostError',
    'The file behind a serial port cannot be written.',
    'Choose a path in a folder that exists, may be written and has room.',
  ),
  ERR_ACCEL: entry('HostError', 'The processor back end failed.', 'Run skep doctor.'),
  ERR_ACCEL_UNSUPPORTED: entry(
    'HostError',
    'That way of running processors is not available.',
    'Use accel "auto" or "software"; skep doctor says what this host offers.',
  ),
  ERR_CPU_UNAVAILABLE: entry(
    'HostError',
    'This host, or what runs the processors, lacks a feature that the model has or that was turned on.',
    'Choose a lower model or leave the feature out; skep doctor says what there is.',
  ),
  ERR_THREAD: entry(
    'HostError',
    'The host does not allow another thread.',
    'Raise the limit on processes (ulimit -u), or stop other programs.',
  ),

  // Consoles.
  ERR_CONSOLE_TIMEOUT: entry(
    'ConsoleError',
    'The text did not appear in time.',
    'See the output the error carries; allow more time, or wait for something else.',
  ),
  ERR_CONSOLE_ENDED: entry(
    'ConsoleError',
    'The machine ended before the text appeared.',
    'See the output the error carries: its last lines usually say why.',
  ),

  // Images.
  ERR_IMAGE_UNKNOWN: entry('ImageError', 'There is no image of that name.', 'skep image list shows the names.'),
  ERR_IMAGE_TOOL: entry(
    'ImageError',
    'A tool that preparing the image needs is not installed.',
    'Install the package that the message names.',
  ),
  ERR_IMAGE_PACKAGE: entry(
    'ImageError',
    "The host's package sources do not have a package.",
    'Add a Debian source to apt, or boot a kernel of your own with --kernel and --initrd.',
  ),
  ERR_IMAGE_NETWORK: entry(
    'ImageError',
    'A package could not be downloaded.',
    'Check the network and the proxy settings; images that are already prepared need neither.',
  ),
  ERR_IMAGE_DISK: entry(
    'ImageError',
    'The cache cannot be written.',
    'Make room, or point XDG_CACHE_HOME to a folder that may be written.',
  ),
  ERR_IMAGE_BUILD: entry(
    'ImageError',
    'The image could not be put together.',
    'The message says at which step; skep image remove NAME starts afresh.',
  ),
  ERR_INITRAMFS: entry(
    'ImageError',
    'An entry cannot be put into an initramfs.',
    'The message names the entry: paths are relative to the root, files under 4 GiB.',
  ),

  // The addon.
  ERR_NATIVE_MISSING: entry(
    'NativeBindingError',
    'The compiled part of skep is not installed for this platform.',
    'Install the package that the message names, or build it in a checkout with npm run build:native.',
  ),
  ERR_NATIVE_LOAD: entry(
    'NativeBindingError',
    'The compiled part of skep is there but cannot be loaded.',
    'The message has the reason of the system; reinstall, or build it with npm run build:native.',
  ),
  ERR_INTERNAL: entry('InternalError', 'A defect of skep.', 'Please report it with the message.'),

  // Loading a guest.
  ...fileErrors,
  ERR_ROM_SIZE: entry(
    'BootError',
    'The ROM has an impossible size.',
    'Pad it at its start to a multiple of 4096 bytes, at most 16 MiB.',
  ),
  ERR_BOOT_NOTHING: entry('BootError', 'There is nothing to boot.', 'Give a kernel or a ROM.'),
  ERR_BOOT_CONFLICT: entry(
    'BootError',
    'Two settings of the boot exclude each other.',
    'Remove the one that the message names.',
  ),
  ERR_BOOT_MEMORY: entry(
    'BootError',
    'Guest memory does not match what is booted; a defect of skep.',
    'Please report it.',
  ),
  ERR_CMDLINE_TOO_LONG: entry('BootError', 'The command line is longer than the kernel takes.', 'Shorten it.'),
  ERR_CMDLINE_NUL: entry('BootError', 'A command line holds a NUL character.', 'Remove it.'),
  ERR_MODULES_UNSUPPORTED: entry(
    'BootError',
    'A kernel of this kind takes no modules.',
    'Pack them into the initial RAM disk.',
  ),
  ERR_MEMORY_TOO_SMALL: entry(
    'BootError',
    'There is too little memory for what is booted.',
    'Give the machine more memory.',
  ),
  ERR_MEMORY_TOO_LARGE: entry(
    'BootError',
    'There is more memory than the machine can address.',
    'Give it less memory.',
  ),
  ERR_MEMORY_ALIGNMENT: entry(
    'BootError',
    'The memory does not end at a page boundary.',
    'Give a whole number of MiB.',
  ),
  ERR_CPUS_RANGE: entry(
    'BootError',
    "There are more processors than the machine's tables can hold.",
    'Give fewer processors.',
  ),
  ERR_BOOT_ENDED: entry(
    'BootError',
    'The machine ended before the guest was up.',
    'See the output the error carries: its last lines usually say why.',
  ),
  ERR_BOOT_TIMEOUT: entry(
    'BootError',
    'The guest was not up in time.',
    'See the output the error carries; allow more time.',
  ),
} as const satisfies Record<string, ErrorEntry>

/** Every code of every error, with what it means and what to do about it. */
export const errorTable: {
  readonly [C in keyof typeof table]: ErrorEntry & { readonly class: (typeof table)[C]['class'] }
} = table

/** The codes of all errors. */
export type ErrorCode = keyof typeof table

/** The codes that errors of class `C` carry. */
export type CodeOf<C extends ErrorClass> = {
  [K in ErrorCode]: (typeof errorTable)[K]['class'] extends C ? K : never
}[ErrorCode]

/** What an error is made of. */
export interface ErrorInit {
  /** Where in the configuration the reason lies, such as `devices["0:31:0"].com1`. */
  readonly path?: string | undefined
  /** Particulars for programs. */
  readonly details?: Readonly<Record<string, unknown>> | undefined
  /** The error behind it. */
  readonly cause?: unknown
}

/**
 * The base of all errors of this package.
 *
 * @example
 * ```ts
 * try { await Vm.create(config) } catch (error) {
 *   if (error instanceof SkepError && error.code === 'ERR_MEMORY_HOST') ...
 * }
 * ```
 */
export class SkepError<C extends ErrorCode = ErrorCode> extends Error {
  /** Stable code, a key of {@link errorTable}. */
  readonly code: C
  /** Where in the configuration the reason lies, if it does. */
  readonly path: string | undefined
  /** Particulars for programs, by code. */
  readonly details: Readonly<Record<string, unknown>>

  constructor(code: C, message: string, init: ErrorInit = {}) {
    super(message, init.cause === undefined ? undefined : { cause: init.cause })
    this.code = code
    this.path = init.path
    this.details = init.details ?? {}
  }

  /** What to do about it, from {@link errorTable}. */
  get remedy(): string {
    return errorTable[this.code].remedy
  }
}

/** One thing that is wrong with a configuration. */
export interface ConfigIssue {
  /** Code of this issue. */
  readonly code: CodeOf<'ConfigError'>
  /** Where, empty for the whole. */
  readonly path: string
  /** What is wrong and what would be right. */
  readonly message: string
}

/** A configuration that cannot be: code, path and message are those of the first of {@link ConfigError.issues}. */
export class ConfigError extends SkepError<CodeOf<'ConfigError'>> {
  /** All that is wrong, in the order of the schema. */
  readonly issues: readonly ConfigIssue[]

  constructor(
    code: CodeOf<'ConfigError'>,
    message: string,
    init: ErrorInit & { issues?: readonly ConfigIssue[] } = {},
  ) {
    super(code, message, init)
    this.issues = init.issues ?? [{ code, path: init.path ?? '', message }]
  }

  /** Makes one error of all issues, of which there is at least one. */
  static from(issues: readonly [ConfigIssue, ...ConfigIssue[]]): ConfigError {
    const [first] = issues
    return new ConfigError(first.code, first.message, { path: first.path, issues })
  }
}

/** The guest's software cannot be loaded, or did not come up. */
export class BootError extends SkepError<CodeOf<'BootError'>> {
  /** The last of the serial output; empty if no processor has run. */
  readonly output: string

  constructor(code: CodeOf<'BootError'>, message: string, init: ErrorInit & { output?: string } = {}) {
    super(code, message, init)
    this.output = init.output ?? ''
  }
}

/** A call in the wrong state. */
export class StateError extends SkepError<CodeOf<'StateError'>> {}

/** An argument that the machine cannot satisfy. */
export class ArgumentError extends SkepError<CodeOf<'ArgumentError'>> {}

/** The host refused something. */
export class HostError extends SkepError<CodeOf<'HostError'>> {}

/** Waiting on a console came to nothing. */
export class ConsoleError extends SkepError<CodeOf<'ConsoleError'>> {
  /** The last of the console's output. */
  readonly output: string

  constructor(code: CodeOf<'ConsoleError'>, message: string, init: ErrorInit & { output?: string } = {}) {
    super(code, message, init)
    this.output = init.output ?? ''
  }
}

/** A guest image cannot be prepared. */
export class ImageError extends SkepError<CodeOf<'ImageError'>> {}

/** The addon is missing or cannot be loaded. */
export class NativeBindingError extends SkepError<CodeOf<'NativeBindingError'>> {}

/** A defect of this package. */
export class InternalError extends SkepError<CodeOf<'InternalError'>> {}

const classes = {
  ConfigError,
  BootError,
  StateError,
  ArgumentError,
  HostError,
  ConsoleError,
  ImageError,
  NativeBindingError,
  InternalError,
} satisfies Record<ErrorClass, unknown>

for (const [name, errorClass] of Object.entries({ SkepError, ...classes })) {
  // On the prototype, so that it shows in stacks and not among an error's own keys.
  Object.defineProperty(errorClass.prototype, 'name', { value: name, configurable: true, writable: true })
}

/** True if `value` is an error of this package with one of `codes`, or with any code if none is given. */
export function isSkepError<C extends ErrorCode>(value: unknown, ...codes: C[]): value is SkepError<C> {
  return value instanceof SkepError && (codes.length === 0 || (codes as ErrorCode[]).includes(value.code))
}

/** The error of `code`, as an instance of the class that the table names. */
export function errorOf(code: ErrorCode, message: string, init: ErrorInit = {}): SkepError {
  const errorClass = classes[errorTable[code].class] as new (
    code: ErrorCode,
    message: string,
    init: ErrorInit,
  ) => SkepError
  return new errorClass(code, message, init)
}

/**
 * What the addon threw, as an error of this package. The addon's message is a JSON object
 * `{ code, message, path?, details? }`; anything else is a defect.
 */
export function fromNative(thrown: unknown): SkepError {
  if (thrown instanceof SkepError) return thrown
  const text = thrown instanceof Error ? thrown.message : String(thrown)
  let value: unknown
  try {
    value = JSON.parse(text)
  } catch {
    return new InternalError('ERR_INTERNAL', text, { cause: thrown })
  }
  if (!isRecord(value) || typeof value['code'] !== 'string' || typeof value['message'] !== 'string') {
    return new InternalError('ERR_INTERNAL', text, { cause: thrown })
  }
  const { code, message, path, details } = value
  const init = {
    path: typeof path === 'string' ? path : undefined,
    details: isRecord(details) ? details : undefined,
  }
  if (!Object.hasOwn(errorTable, code)) {
    return new InternalError('ERR_INTERNAL', `${message} (${code})`, { ...init, cause: thrown })
  }
  return errorOf(code as ErrorCode, message, init)
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

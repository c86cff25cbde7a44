/**
 * The options of a configuration, in one table: what each takes and what it is for. Error messages, suggestions and the
 * descriptions in the JSON Schema come from here. Paths are written as in errors; `[]` stands for any element.
 */

import { cpuFeatures, cpuModels } from './cpu.js'

/** What the table says about an option. */
export interface ConfigOption {
  /** What it takes, to follow "expected". */
  readonly expects: string
  /** What it is for; shown by editors. */
  readonly about: string
}

const models = `${cpuModels.slice(0, -1).join(', ')} or ${cpuModels.at(-1)}`
const serial = 'console, stdio, none, file:PATH, or { kind }'
const port = (name: string, where: string, fallback: string): ConfigOption => ({
  expects: serial,
  about: `What serial port ${name} (${where}) is attached to. Default ${fallback}.`,
})
const serialKind: ConfigOption = { expects: '"console", "file" or "none"', about: 'What the port is attached to.' }
const serialPath: ConfigOption = { expects: 'a path', about: 'The file that takes the output.' }

/** All options, by path. */
export const configOptions: ReadonlyMap<string, ConfigOption> = new Map(
  Object.entries({
    '': { expects: 'an object', about: 'A machine.' },
    version: { expects: '1', about: 'Version of the form.' },
    name: {
      expects: '1 to 255 bytes of text without control characters',
      about: 'Name, for people and for SMBIOS. Default vm.',
    },
    uuid: {
      expects: 'a UUID such as 01234567-89ab-cdef-0123-456789abcdef',
      about: 'UUID for SMBIOS. Default: made of the name.',
    },
    cpus: {
      expects: 'a whole number from 1 to 64, or { sockets, cores, threads } whose product is one',
      about: 'Number of processors or their topology. Default 1.',
    },
    'cpus.sockets': { expects: 'a whole number from 1 to 64', about: 'Packages. Default 1.' },
    'cpus.cores': { expects: 'a whole number from 1 to 64', about: 'Cores in a package. Default 1.' },
    'cpus.threads': { expects: 'a whole number from 1 to 64', about: 'Threads of a core. Default 1.' },
    cpu: {
      expects: `${models}, or { model, features }`,
      about: 'The processor that the guest sees. Default host: all that there is here.',
    },
    'cpu.model': { expects: models, about: 'What the processor starts from. Default host.' },
    'cpu.features': {
      expects: 'features by name: { "aes": false }',
      about: 'Features on and off, on top of the model, by their names in /proc/cpuinfo.',
    },
    ...Object.fromEntries(
      cpuFeatures.map((name) => [
        `cpu.features.${name}`,
        { expects: 'true or false', about: 'Whether the processor shows it. Default: as the model has it.' },
      ]),
    ),
    'cpus.pin': {
      expects: 'host CPUs (0 to 8191) by processor, such as { "0": 2, "1": [2, 3] }',
      about: "The host's CPUs that a processor may run on, by its number. Default: none is named.",
    },
    memory: {
      expects: 'a size from 2M to 16T in whole MiB, such as 512M or 2G (or a number of bytes)',
      about: 'Guest memory. Default 256M.',
    },
    'memory.size': {
      expects: 'a size from 2M to 16T in whole MiB, such as 512M or 2G (or a number of bytes)',
      about: 'How much. Default 256M.',
    },
    'memory.wired': {
      expects: 'true or false',
      about: 'Whether all memory is taken at once and never paged out. Default false.',
    },
    'memory.hugePages': {
      expects: '"auto", false, "thp", "2M" or "1G"',
      about:
        "Larger pages of the host's: transparent ones, or 2 MiB or 1 GiB from its pool. Default auto: what it gives unasked.",
    },
    accel: { expects: '"auto", "software" or "kvm"', about: 'What runs the processors. Default auto.' },
    engine: {
      expects: '"auto", "jit", "interpreter" or "lockstep"',
      about: 'The engine of the software CPU. Default auto: the JIT, unless SKEP_ENGINE says otherwise.',
    },
    exits: { expects: '{ hlt, pause, haltPoll }', about: 'What leaves the guest.' },
    'exits.hlt': {
      expects: 'true or false',
      about: "Whether HLT leaves the guest, so that the host's CPU can do other work. Default true.",
    },
    'exits.pause': {
      expects: 'true or false',
      about: 'Whether a loop of PAUSE leaves the guest, so that others can run. Default true.',
    },
    'exits.haltPoll': {
      expects: 'nanoseconds from 0 to 1000000000, or null',
      about: 'For how long a halted processor polls before its thread sleeps. Default null: as the host does.',
    },
    boot: { expects: '{ kernel } or { rom }', about: 'What is booted.' },
    'boot.kind': { expects: '"kernel" or "rom"', about: 'Tells the two kinds of boot apart.' },
    'boot.kernel': { expects: 'a path', about: 'Linux bzImage, ELF with a PVH note, or multiboot image.' },
    'boot.initrd': { expects: 'a path', about: 'Initial RAM disk.' },
    'boot.cmdline': { expects: 'at most 65536 bytes of text without NUL', about: "The kernel's command line." },
    'boot.modules': { expects: 'an array of at most 64 { path, cmdline }', about: 'Multiboot and PVH modules.' },
    'boot.modules[]': { expects: '{ path, cmdline }', about: 'A file handed to the kernel.' },
    'boot.modules[].path': { expects: 'a path', about: 'The file.' },
    'boot.modules[].cmdline': { expects: 'at most 65536 bytes of text without NUL', about: 'Its command line.' },
    'boot.rom': { expects: 'a path', about: 'A flat firmware image whose end is at 4 GiB, at most 16 MiB.' },
    devices: { expects: 'devices by slot: { "0:31:0": { "type": "lpc" } }', about: 'Devices by bus:device:function.' },
    'devices["0:31:0"]': { expects: '{ type: "lpc" }', about: 'The LPC bridge and its serial ports.' },
    'devices["0:31:0"].type': { expects: '"lpc"', about: 'The kind of device.' },
    'devices["0:31:0"].com1': port('1', '0x3f8, IRQ 4', 'console'),
    'devices["0:31:0"].com2': port('2', '0x2f8, IRQ 3', 'none'),
    'devices["0:31:0"].com3': port('3', '0x3e8, IRQ 4', 'none'),
    'devices["0:31:0"].com4': port('4', '0x2e8, IRQ 3', 'none'),
    ...Object.fromEntries(
      [1, 2, 3, 4].flatMap((n) => [
        [`devices["0:31:0"].com${n}.kind`, serialKind],
        [`devices["0:31:0"].com${n}.path`, serialPath],
      ]),
    ),
    debugExit: {
      expects: 'true or false',
      about: 'Whether a write to port 0xf4 ends the machine with the status (value << 1) | 1. Default false.',
    },
    rtc: { expects: '"utc" or "localtime"', about: 'What the real-time clock shows. Default utc.' },
    onReboot: {
      expects: '"restart" or "exit"',
      about: 'Whether a guest that reboots starts again or ends the machine. Default restart.',
    },
  }),
)

/** Options of parts that this version does not have, by path, and what those parts are called. */
export const unsupportedOptions: ReadonlyMap<string, string> = new Map(
  Object.entries({
    disks: 'disks',
    nics: 'networks',
    shares: 'shared folders',
    display: 'a display',
    keyboard: 'a keyboard',
    usb: 'USB',
    audio: 'audio',
    tpm: 'a TPM',
    gdb: 'a debug stub',
    'boot.uefi': 'UEFI',
    'boot.disk': 'disks',
    'boot.image': 'images in the configuration',
  }),
)

/** bhyve's devices that this version does not have. */
export const unsupportedDevices: ReadonlySet<string> = new Set([
  'ahci',
  'ahci-cd',
  'ahci-hd',
  'amd_hostbridge',
  'e1000',
  'fbuf',
  'hda',
  'hostbridge',
  'nvme',
  'passthru',
  'uart',
  'virtio-9p',
  'virtio-balloon',
  'virtio-blk',
  'virtio-console',
  'virtio-fs',
  'virtio-gpu',
  'virtio-input',
  'virtio-net',
  'virtio-rnd',
  'virtio-scsi',
  'virtio-vsock',
  'xhci',
])

/** Names of the options one level under `path`. */
export function childrenOf(path: string): string[] {
  const prefix = path === '' ? '' : `${path}.`
  const all = [...configOptions.keys(), ...unsupportedOptions.keys()]
  return all
    .filter((name) => name !== '' && name.startsWith(prefix))
    .map((name) => name.slice(prefix.length))
    .filter((name) => /^\w+$/.test(name))
}

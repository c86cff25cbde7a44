/** From a configuration to a specification: every slot, every default. */
import { createHash } from 'node:crypto'
import { resolve as resolvePath } from 'node:path'
import { type Diagnosis, diagnoseAccelerator } from '../doctor.js'
import { ConfigError, HostError } from '../errors.js'
import { comPorts, layOut } from '../pci/layout.js'
import { lpcSlot } from '../pci/slot.js'
import { engineFor, isEngine } from './engine.js'
import { parseSize } from './size.js'
import type { MachineSpec, VmConfig } from './types.js'
import { validate } from './validate.js'

/** How a configuration is resolved. */
export interface ResolveOptions {
  /** The folder from which relative paths start. Default: the current one. */
  base?: string | undefined
  /** The host that is resolved for, as `diagnose` tells of it; asked if `accel` is not `'software'`. Default: this one. */
  host?: Pick<Diagnosis, 'accelerator' | 'kvm'> | undefined
}

/** The configuration as it is; gives editors the type of the literal. */
export function defineVm<const C extends VmConfig>(config: C): C {
  return config
}

/**
 * Validates a configuration and fills everything in: the slot of every device, every default, absolute paths. Resolving
 * a specification gives the same specification.
 *
 * @throws ConfigError if the configuration cannot be.
 * @throws HostError with `ERR_KVM_MISSING`, `ERR_KVM_PERMISSION`, `ERR_KVM_VERSION`, `ERR_KVM_CAPABILITY` or `ERR_KVM_DEVICE`
 *   if `accel` is `'kvm'` and the host has it not.
 * @throws NativeBindingError if the host is asked and the compiled part is missing.
 */
export function resolve(config: VmConfig, options: ResolveOptions = {}): MachineSpec {
  const valid = validate(config)
  const file = (path: string): string => resolvePath(options.base ?? process.cwd(), path)
  const name = valid.name ?? 'vm'
  const accel = accelerator(valid, options.host)
  const cpus = topology(valid.cpus ?? 1)
  const spec: MachineSpec = {
    version: 1,
    name,
    uuid: valid.uuid?.toLowerCase() ?? uuidOf(name),
    cpus,
    cpu: processor(valid.cpu ?? 'host'),
    memory: memory(valid.memory ?? {}),
    accel,
    engine: accel === 'software' ? engineFor(valid.engine, cpus) : null,
    exits: {
      hlt: valid.exits?.hlt ?? true,
      pause: valid.exits?.pause ?? true,
      haltPoll: valid.exits?.haltPoll ?? null,
    },
    boot: boot(valid.boot, file),
    devices: layOut(valid.devices?.[lpcSlot], file),
    debugExit: valid.debugExit ?? false,
    rtc: valid.rtc ?? 'utc',
    onReboot: valid.onReboot ?? 'restart',
  }
  checkPins(spec.cpus)
  checkSerial(valid, spec)
  return spec
}

function topology(cpus: NonNullable<VmConfig['cpus']>): MachineSpec['cpus'] {
  if (typeof cpus === 'number') return { sockets: 1, cores: cpus, threads: 1, pin: {} }
  const pin = Object.entries(cpus.pin ?? {}).map(([vcpu, host]): [string, number[]] => [
    vcpu,
    [...new Set([host].flat())].sort((a, b) => a - b),
  ])
  const { sockets = 1, cores = 1, threads = 1 } = cpus
  return { sockets, cores, threads, pin: Object.fromEntries(pin) }
}

function processor(cpu: NonNullable<VmConfig['cpu']>): MachineSpec['cpu'] {
  const { model = 'host', features = {} } = typeof cpu === 'string' ? { model: cpu } : cpu
  const given = Object.entries(features).filter(([, on]) => on !== undefined)
  return { model, features: Object.fromEntries(given) }
}

function checkPins({ sockets, cores, threads, pin }: MachineSpec['cpus']): void {
  const count = sockets * cores * threads
  const vcpu = Object.keys(pin).find((number) => Number(number) >= count)
  if (vcpu === undefined) return
  const path = `cpus.pin.${vcpu}`
  const message = `${path}: there is no processor ${vcpu} to pin; this machine has ${count}, numbered from 0`
  throw new ConfigError('ERR_CONFIG_CPUS', message, { path })
}

function memory(config: NonNullable<VmConfig['memory']>): MachineSpec['memory'] {
  const { size = '256M', wired = false, hugePages = 'auto' } = typeof config === 'object' ? config : { size: config }
  return { size: parseSize(size) ?? 0, wired, hugePages }
}

/** What runs the processors on this host, or on the one that is given. */
function accelerator({ accel, engine }: VmConfig, host: ResolveOptions['host']): MachineSpec['accel'] {
  if (accel === 'kvm' && isEngine(engine)) {
    const message = 'engine: it is about the software CPU, and accel is "kvm"; leave one of them out'
    throw new ConfigError('ERR_CONFIG_ENGINE', message, { path: 'engine' })
  }
  if (accel === 'software' || isEngine(engine)) return 'software'
  const { accelerator, kvm } = host ?? diagnoseAccelerator()
  if (accel !== 'kvm') return accelerator.auto
  if (kvm.usable) return 'kvm'
  const message = `accel: ${kvm.error ?? 'KVM cannot be used here'}; accel "software" needs none of it`
  throw new HostError(kvm.code ?? 'ERR_KVM_DEVICE', message, { path: 'accel' })
}

function boot(config: VmConfig['boot'], file: (path: string) => string): MachineSpec['boot'] {
  if ('rom' in config) return { kind: 'rom', rom: file(config.rom) }
  return {
    kind: 'kernel',
    kernel: file(config.kernel),
    initrd: config.initrd == null ? null : file(config.initrd),
    cmdline: config.cmdline ?? '',
    modules: (config.modules ?? []).map(({ path, cmdline }) => ({ path: file(path), cmdline: cmdline ?? '' })),
  }
}

function checkSerial(config: VmConfig, spec: MachineSpec): void {
  const files = new Map<string, string>()
  let terminal: string | undefined
  for (const port of comPorts) {
    const path = `devices["${lpcSlot}"].${port}`
    const serial = spec.devices[lpcSlot][port]
    if (serial.kind === 'file') {
      const other = files.get(serial.path)
      if (other !== undefined) {
        throw new ConfigError('ERR_CONFIG_SERIAL', `${path} and ${other} both write to ${serial.path}`, { path })
      }
      files.set(serial.path, path)
    }
    if (config.devices?.[lpcSlot]?.[port] === 'stdio') {
      if (terminal !== undefined) {
        throw new ConfigError('ERR_CONFIG_SERIAL', `${path} and ${terminal} both ask for stdio`, { path })
      }
      terminal = path
    }
  }
}

/** A UUID of version 8 (RFC 9562 §5.8) made of the name, so that a machine keeps it from start to start. */
function uuidOf(name: string): string {
  const hash = createHash('sha256').update(`skep machine ${name}`).digest()
  hash.writeUInt8((hash.readUInt8(6) & 0x0f) | 0x80, 6)
  hash.writeUInt8((hash.readUInt8(8) & 0x3f) | 0x80, 8)
  const hex = hash.toString('hex', 0, 16)
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-')
}

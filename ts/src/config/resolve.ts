/** From a configuration to a specification: every slot, every default. */
import { createHash } from 'node:crypto'
import { resolve as resolvePath } from 'node:path'
import { ConfigError, HostError } from '../errors.js'
import { comPorts, layOut } from '../pci/layout.js'
import { lpcSlot } from '../pci/slot.js'
import { parseSize } from './size.js'
import type { MachineSpec, VmConfig } from './types.js'
import { validate } from './validate.js'

/** How a configuration is resolved. */
export interface ResolveOptions {
  /** The folder from which relative paths start. Default: the current one. */
  base?: string | undefined
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
 * @throws HostError with `ERR_ACCEL_UNSUPPORTED` if this version cannot run processors that way.
 */
export function resolve(config: VmConfig, options: ResolveOptions = {}): MachineSpec {
  const valid = validate(config)
  const file = (path: string): string => resolvePath(options.base ?? process.cwd(), path)
  const name = valid.name ?? 'vm'
  const spec: MachineSpec = {
    version: 1,
    name,
    uuid: valid.uuid?.toLowerCase() ?? uuidOf(name),
    cpus: topology(valid.cpus ?? 1),
    cpu: processor(valid.cpu ?? 'host'),
    memory: { size: bytes(valid.memory ?? '256M') },
    accel: accelerator(valid.accel ?? 'auto'),
    engine: 'interpreter',
    boot: boot(valid.boot, file),
    devices: layOut(valid.devices?.[lpcSlot], file),
    debugExit: valid.debugExit ?? false,
    rtc: valid.rtc ?? 'utc',
    onReboot: valid.onReboot ?? 'restart',
  }
  checkSerial(valid, spec)
  return spec
}

function topology(cpus: NonNullable<VmConfig['cpus']>): MachineSpec['cpus'] {
  if (typeof cpus === 'number') return { sockets: 1, cores: cpus, threads: 1 }
  return { sockets: cpus.sockets ?? 1, cores: cpus.cores ?? 1, threads: cpus.threads ?? 1 }
}

function processor(cpu: NonNullable<VmConfig['cpu']>): MachineSpec['cpu'] {
  const { model = 'host', features = {} } = typeof cpu === 'string' ? { model: cpu } : cpu
  const given = Object.entries(features).filter(([, on]) => on !== undefined)
  return { model, features: Object.fromEntries(given) }
}

function bytes(memory: NonNullable<VmConfig['memory']>): number {
  return parseSize(typeof memory === 'object' ? memory.size : memory) ?? 0
}

function accelerator(accel: NonNullable<VmConfig['accel']>): 'software' {
  if (accel !== 'kvm') return 'software'
  const message = 'accel: this version of skep cannot run processors on KVM yet; use "auto" or "software"'
  throw new HostError('ERR_ACCEL_UNSUPPORTED', message, { path: 'accel' })
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

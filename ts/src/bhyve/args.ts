/** The arguments of bhyve(8), as far as this version has what they mean. */
import { unsupportedDevices } from '../config/options.js'
import { maxHostCpu } from '../config/schema.js'
import { didYouMean } from '../config/suggest.js'
import type { CpuTopology, SerialConfig } from '../config/types.js'
import { ConfigError } from '../errors.js'
import { lpcSlot, parseSlot } from '../pci/slot.js'

/**
 * `-c`: a number, or `[[cpus=]n][,sockets=n][,cores=n][,threads=n]`. What is no number is returned as it is, for the
 * configuration's check to refuse.
 */
export function parseCpus(text: string): number | string | CpuTopology {
  if (!/[=,]/.test(text)) return asNumber(text)
  const values: Record<string, number> = {}
  for (const [index, part] of text.split(',').entries()) {
    const [key = '', value] = part.includes('=') ? part.split('=', 2) : index === 0 ? ['cpus', part] : [part]
    const known = ['cpus', 'sockets', 'cores', 'threads']
    if (!known.includes(key) || value === undefined) {
      throw refuse(
        'ERR_CONFIG_CPUS',
        `cpus: ${JSON.stringify(part)} is not ${known.join('=n, ')}=n${didYouMean(key, known)}`,
      )
    }
    const number = asNumber(value)
    if (typeof number === 'string') throw refuse('ERR_CONFIG_CPUS', `cpus: ${JSON.stringify(value)} is not a number`)
    values[key] = number
  }
  const { cpus, ...topology } = values
  if (cpus === undefined) return topology
  if (Object.keys(topology).length === 0) return cpus
  const { sockets = 1, cores = 1, threads = 1 } = topology
  if (sockets * cores * threads !== cpus) {
    throw refuse('ERR_CONFIG_CPUS', `cpus: ${sockets} sockets of ${cores} cores of ${threads} threads are not ${cpus}`)
  }
  return topology
}

/** `-m`: a size with a suffix; without one MiB, or bytes if it is at least 1 Mi. */
export function parseMemory(text: string): number | string {
  const number = asNumber(text)
  if (typeof number === 'string' || !Number.isInteger(number)) return text
  return number < 2 ** 20 ? number * 2 ** 20 : number
}

/** `-p`: `vcpu:hostcpu`, both numbered from 0. */
export function parsePin(text: string): { vcpu: string; hostCpu: number } {
  const match = /^(0|[1-9]\d{0,3}):(\d{1,5})$/.exec(text)
  const [, vcpu = '', cpu = ''] = match ?? []
  const hostCpu = Number(cpu)
  if (match && hostCpu <= maxHostCpu) return { vcpu, hostCpu }
  const expected = 'a processor and the host CPU it runs on, VCPU:HOSTCPU such as 0:2'
  throw refuse('ERR_CONFIG_CPUS', `cpus: expected ${expected}, got ${JSON.stringify(text)}`)
}

/** What a `-l` says. */
export type LpcArgument = { port: 'com1' | 'com2' | 'com3' | 'com4'; serial: SerialConfig } | { rom: string }

/** `-l`: `com1,stdio` (or `none`, or `file:PATH`) to `com4`, and `bootrom,PATH`. */
export function parseLpc(text: string): LpcArgument {
  const [device = '', conf = ''] = splitFirst(text)
  if (device === 'bootrom') {
    if (conf === '') throw refuse('ERR_CONFIG_INVALID', 'bootrom wants a file: -l bootrom,PATH')
    return { rom: conf }
  }
  if (device === 'com1' || device === 'com2' || device === 'com3' || device === 'com4') {
    return { port: device, serial: parseSerial(conf) }
  }
  const known = ['com1', 'com2', 'com3', 'com4', 'bootrom']
  const message = `${JSON.stringify(text)}: there is no ${device || 'device'} on the LPC bridge${didYouMean(device, known)}`
  throw refuse('ERR_CONFIG_UNSUPPORTED', `${message}; there are ${known.join(', ')}`)
}

/** What a serial port is attached to, on a command line. */
export function parseSerial(text: string): SerialConfig {
  if (text === 'stdio' || text === 'console' || text === 'none') return text
  if (text.startsWith('file:') && text.length > 'file:'.length) return text as `file:${string}`
  const hint = didYouMean(text, ['stdio', 'console', 'none'])
  throw refuse(
    'ERR_CONFIG_SERIAL',
    `serial port: expected stdio, none or file:PATH, got ${JSON.stringify(text)}${hint}`,
  )
}

/** `-s`: what is there anyway is taken (`0,hostbridge` and `31,lpc`), anything else refused. */
export function checkSlot(text: string): void {
  const [slotText = '', conf = ''] = splitFirst(text)
  const [device = ''] = splitFirst(conf)
  const slot = parseSlot(slotText)
  if (slot === undefined) {
    const message = `${JSON.stringify(text)}: expected SLOT,DEVICE with a slot such as 31 or 0:31:0`
    throw refuse('ERR_CONFIG_SLOT', message)
  }
  if (device === 'hostbridge' || device === 'amd_hostbridge') {
    if (slot === '0:0:0') return
    throw refuse('ERR_CONFIG_SLOT', `${JSON.stringify(text)}: the host bridge sits in slot 0:0:0`)
  }
  if (device === 'lpc') {
    if (slot === lpcSlot) return
    throw refuse('ERR_CONFIG_SLOT', `${JSON.stringify(text)}: the lpc bridge sits in slot ${lpcSlot}`)
  }
  if (unsupportedDevices.has(device)) {
    const message = `${JSON.stringify(text)}: this version of skep has no ${device} yet`
    throw refuse('ERR_CONFIG_UNSUPPORTED', message)
  }
  const known = ['lpc', ...unsupportedDevices]
  throw refuse('ERR_CONFIG_SLOT', `${JSON.stringify(text)}: there is no device ${device}${didYouMean(device, known)}`)
}

function splitFirst(text: string): [string, string] {
  const at = text.indexOf(',')
  return at < 0 ? [text, ''] : [text.slice(0, at), text.slice(at + 1)]
}

function asNumber(text: string): number | string {
  return /^-?\d+(\.\d+)?$/.test(text) ? Number(text) : text
}

function refuse(code: ConfigError['code'], message: string): ConfigError {
  return new ConfigError(code, message)
}

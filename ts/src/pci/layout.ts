/** The layout of slots: who sits where. In this version the guest has no PCI bus; the LPC bridge is the one resident. */
import type { LpcConfig, MachineSpec, Serial, SerialConfig } from '../config/types.js'
import { lpcSlot } from './slot.js'

/** The serial ports of the LPC bridge, in order. */
export const comPorts = ['com1', 'com2', 'com3', 'com4'] as const

/** Places the devices and fills in what was left open; `file` makes paths absolute. */
export function layOut(lpc: LpcConfig | undefined, file: (path: string) => string): MachineSpec['devices'] {
  const serial = (config: SerialConfig): Serial => {
    if (config === 'console' || config === 'stdio') return { kind: 'console' }
    if (config === 'none') return { kind: 'none' }
    if (typeof config === 'string') return { kind: 'file', path: file(config.slice('file:'.length)) }
    return config.kind === 'file' ? { kind: 'file', path: file(config.path) } : { kind: config.kind }
  }
  const { com1 = 'console', com2 = 'none', com3 = 'none', com4 = 'none' } = lpc ?? { type: 'lpc' }
  return {
    [lpcSlot]: { type: 'lpc', com1: serial(com1), com2: serial(com2), com3: serial(com3), com4: serial(com4) },
  }
}

/** PCI slots: how they are written, and which devices sit where. */

/** A slot in full, `bus:device:function` in decimal. */
export type Slot = `${number}:${number}:${number}`

/** Where the LPC bridge sits, as in bhyve's manual. */
export const lpcSlot = '0:31:0'

/**
 * A slot in full from any of bhyve's ways to write it: `31`, `31:0` (device and function) or `0:31:0`. `undefined` if it
 * is none of them, or out of range: 256 busses of 32 devices of 8 functions.
 */
export function parseSlot(text: string): Slot | undefined {
  if (!/^\d{1,3}(:\d{1,3}){0,2}$/.test(text)) return undefined
  const parts = text.split(':').map(Number)
  const [bus = 0, device = 0, fn = 0] = parts.length === 3 ? parts : [0, ...parts]
  return bus < 256 && device < 32 && fn < 8 ? `${bus}:${device}:${fn}` : undefined
}

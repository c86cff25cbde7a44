/** The escape key of the terminal, as in telnet: ^] and a letter. */

/** `^]` */
const escapeKey = 0x1d

/** What a key after the escape key asks for. */
export type EscapeAction = 'quit' | 'help' | 'power-button' | 'reset'

const actions: ReadonlyMap<number, EscapeAction> = new Map([
  ['.'.charCodeAt(0), 'quit'],
  ['?'.charCodeAt(0), 'help'],
  ['p'.charCodeAt(0), 'power-button'],
  ['r'.charCodeAt(0), 'reset'],
])

/** What the help says. */
export const escapeHelp: readonly string[] = [
  '^] .   end the machine at once',
  '^] p   press its power button',
  '^] r   reset it',
  '^] ^]  send ^] to the guest',
  '^] ?   this help',
]

/** Splits what is typed into what the guest gets and what is meant for us. */
export class EscapeFilter {
  #escaped = false;

  /** Takes what was typed: bytes for the guest and actions, in order. */
  *feed(typed: Uint8Array): Generator<{ data: Buffer } | { action: EscapeAction }, void, undefined> {
    let from = 0
    for (const [at, byte] of typed.entries()) {
      if (this.#escaped) {
        this.#escaped = false
        from = at + 1
        const action = actions.get(byte)
        if (action) yield { action }
        else if (byte === escapeKey) yield { data: Buffer.of(escapeKey) }
        // Not one of ours: both keys were meant for the guest.
        else yield { data: Buffer.of(escapeKey, byte) }
      } else if (byte === escapeKey) {
        if (at > from) yield { data: Buffer.from(typed.subarray(from, at)) }
        this.#escaped = true
        from = at + 1
      }
    }
    if (from < typed.length) yield { data: Buffer.from(typed.subarray(from)) }
  }
}

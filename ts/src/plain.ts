/** Text without the escape sequences that terminals act upon. */

/** Longest sequence that is taken for one, in UTF-16 code units. */
const maxSequence = 4096

/**
 * Removes escape sequences (ECMA-48 §5.4 and §5.6: control sequences, control strings, and two-character ones) from text
 * that comes in pieces. A sequence that is not whole yet is held back.
 */
export class PlainText {
  #held = ''

  /** The next piece, without sequences. */
  write(piece: string): string {
    const text = this.#held + piece
    this.#held = ''
    if (!text.includes('\x1b')) return text
    const plain = text.replace(sequence, '')
    const open = openSequence.exec(plain)
    if (!open || open[0].length > maxSequence) return plain
    this.#held = open[0]
    return plain.slice(0, open.index)
  }
}

// CSI with parameters, intermediates and a final byte; OSC, DCS, SOS, PM, APC up to BEL or ST; any other escape of nF or two
// characters.
const sequence =
  // biome-ignore lint/suspicious/noControlCharactersInRegex: that is what is looked for
  /\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]+[0-~]|[0-OQ-WYZ\\`-~])/g

// biome-ignore lint/suspicious/noControlCharactersInRegex: that is what is looked for
const openSequence = /\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)$/

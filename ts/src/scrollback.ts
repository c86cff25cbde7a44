/** The last of a console's output, and those who read it at their own pace. */

/**
 * A ring of bytes with absolute positions: byte `n` is the `n`-th that was ever written. The newest `keep` bytes are always
 * there; `room` more may be written before a reader that started at the oldest of them loses any.
 */
export class Scrollback {
  readonly #keep: number
  readonly #capacity: number
  #ring: Buffer | undefined
  #total = 0

  constructor(keep: number, room: number) {
    this.#keep = keep
    this.#capacity = keep + room
  }

  /** Bytes ever written. */
  get total(): number {
    return this.#total
  }

  /** Position of the oldest byte that a new reader may start from. */
  get oldest(): number {
    return Math.max(0, this.#total - this.#keep)
  }

  /** Appends bytes. */
  write(data: Uint8Array): void {
    // Most serial ports never say anything: the ring is made when the first byte comes.
    this.#ring ??= Buffer.allocUnsafe(this.#capacity)
    const tail = data.length > this.#capacity ? data.subarray(data.length - this.#capacity) : data
    const at = (this.#total + data.length - tail.length) % this.#capacity
    const first = Math.min(tail.length, this.#capacity - at)
    this.#ring.set(tail.subarray(0, first), at)
    this.#ring.set(tail.subarray(first), 0)
    this.#total += data.length
  }

  /** A copy of up to `length` bytes from position `from`, or from the oldest if those are gone; with where it starts. */
  read(from: number, length: number): { start: number; data: Buffer } {
    const start = Math.max(from, this.#total - this.#capacity, 0)
    const size = Math.max(0, Math.min(length, this.#total - start))
    const data = Buffer.allocUnsafe(size)
    if (this.#ring && size > 0) {
      const at = start % this.#capacity
      const first = Math.min(size, this.#capacity - at)
      this.#ring.copy(data, 0, at, at + first)
      this.#ring.copy(data, first, 0, size - first)
    }
    return { start, data }
  }

  /** The newest `length` bytes. */
  tail(length: number): Buffer {
    const size = Math.min(length, this.#keep)
    return this.read(Math.max(0, this.#total - size), size).data
  }
}

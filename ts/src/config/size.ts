/** Sizes of memory: bytes, or a number with a binary suffix. */

/** Suffixes of sizes: K = 2^10, M = 2^20, G = 2^30, T = 2^40. */
export type SizeSuffix = 'K' | 'M' | 'G' | 'T'

/** Bytes as a number, or such as `'512M'` or `'1.5G'`. */
export type Size = number | `${number}${SizeSuffix | Lowercase<SizeSuffix>}`

/** What {@link Size} strings look like. */
export const sizePattern: RegExp = /^(\d+)(?:\.(\d{1,9}))?([KMGTkmgt])$/

const exponents: Readonly<Record<string, number>> = { K: 10, M: 20, G: 30, T: 40 }

/**
 * The bytes that `size` stands for, or `undefined` if it is not a size: a number that is no whole number of bytes or too
 * large to be exact, or a string that is not a number with one of the suffixes.
 */
export function parseSize(size: number | string): number | undefined {
  if (typeof size === 'number') return Number.isSafeInteger(size) && size >= 0 ? size : undefined
  const match = sizePattern.exec(size)
  if (!match) return undefined
  const [, whole = '', fraction = '', suffix = ''] = match
  const unit = 1n << BigInt(exponents[suffix.toUpperCase()] ?? 0)
  const scale = 10n ** BigInt(fraction.length)
  const scaled = BigInt(whole + fraction) * unit
  if (scaled % scale !== 0n) return undefined
  const bytes = scaled / scale
  return bytes <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(bytes) : undefined
}

/** Bytes in the largest unit in which they are whole: `536870912` is `512M`. */
export function formatSize(bytes: number): string {
  for (const suffix of ['T', 'G', 'M', 'K'] as const) {
    const unit = 2 ** (exponents[suffix] ?? 0)
    if (bytes !== 0 && bytes % unit === 0) return `${bytes / unit}${suffix}`
  }
  return String(bytes)
}

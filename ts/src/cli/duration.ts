/** Durations on a command line. */

const units: Readonly<Record<string, number>> = { ms: 1, s: 1000, m: 60_000, h: 3_600_000 }

/** Milliseconds of `90` (seconds), `1.5s`, `500ms`, `2m` or `1h`; `undefined` if it is none of them, or over 24 days. */
export function parseDuration(text: string): number | undefined {
  const match = /^(\d+(?:\.\d+)?)(ms|s|m|h)?$/.exec(text)
  if (!match) return undefined
  const ms = Number(match[1]) * (units[match[2] ?? 's'] ?? 0)
  return ms > 0 && ms < 2 ** 31 ? ms : undefined
}

/** A time of a second or less, in nanoseconds: `0`, `500ns`, `200us`, `1ms`, `1s`; `undefined` if it is none. */
export function parseNanoseconds(text: string): number | undefined {
  if (text === '0') return 0
  const match = /^(\d{1,10})(ns|us|ms|s)$/.exec(text)
  const [, number = '', unit = ''] = match ?? []
  const time = Number(number) * ({ ns: 1, us: 1e3, ms: 1e6, s: 1e9 }[unit] ?? Number.NaN)
  return time <= 1e9 ? time : undefined
}

import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { formatSize, parseSize } from '../../ts/src/config/size.js'

describe('sizes', () => {
  test.each([
    ['512M', 512 * 2 ** 20],
    ['2G', 2 ** 31],
    ['2g', 2 ** 31],
    ['1.5G', 1.5 * 2 ** 30],
    ['1T', 2 ** 40],
    ['0K', 0],
    [4096, 4096],
  ])('%s is %i bytes', (size, bytes) => {
    expect(parseSize(size)).toBe(bytes)
  })

  test.each([
    '',
    'M',
    'banana',
    '512',
    '512MB',
    '-1M',
    '1e3M',
    ' 1M',
    '1M ',
    '0x10M',
    '1.M',
    '.5G',
    '1.3K',
    '9999999T',
    1.5,
    -1,
    Number.NaN,
    Number.POSITIVE_INFINITY,
    2 ** 60,
  ])('%j is no size', (size) => {
    expect(parseSize(size)).toBeUndefined()
  })

  test('what is formatted is parsed back', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 2 ** 42 }), fc.constantFrom(1, 2 ** 10, 2 ** 20), (count, unit) => {
        const bytes = count * unit
        fc.pre(Number.isSafeInteger(bytes))
        const text = formatSize(bytes)
        expect(/[KMGT]$/.test(text) ? parseSize(text) : Number(text)).toBe(bytes)
      }),
    )
  })

  test('fractions are exact or refused', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 9999 }),
        fc.integer({ min: 0, max: 9999 }),
        fc.constantFrom('K', 'M', 'G'),
        (a, b, unit) => {
          const bytes = parseSize(`${a}.${b}${unit}`)
          const scale = 10n ** BigInt(String(b).length)
          const scaled = BigInt(`${a}${b}`) * 1024n ** BigInt('KMG'.indexOf(unit) + 1)
          expect(bytes === undefined).toBe(scaled % scale !== 0n)
          if (bytes !== undefined) expect(BigInt(bytes) * scale).toBe(scaled)
        },
      ),
    )
  })

  test('nothing that is typed throws', () => {
    fc.assert(
      fc.property(fc.string(), (text) => {
        const bytes = parseSize(text)
        expect(bytes === undefined || Number.isSafeInteger(bytes)).toBe(true)
      }),
    )
  })
})

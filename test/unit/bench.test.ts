// What the benchmarks conclude from samples, and how they show it.
import { describe, expect, test } from 'vitest'
// @ts-expect-error plain JavaScript, like all of bench
import { chart, decades } from '../../bench/lib/chart.mjs'
// @ts-expect-error
import { picture } from '../../bench/lib/cpu-chart.mjs'
// @ts-expect-error
import { orderFor, subjects } from '../../bench/lib/cpu-programs.mjs'
// @ts-expect-error
import { digits, perOperation, report, summarise, time } from '../../bench/lib/cpu-report.mjs'
// @ts-expect-error
import { geometricMean, median, table } from '../../bench/lib/stats.mjs'

const SECOND = 1e9

/** A sample of `seconds` for an operation, by a guest whose clock is right. */
const sample = (name: string, peer: string, run: number, seconds: number) => ({
  ...{ name, peer, run, operations: 1, firstNs: 2 * seconds * SECOND },
  ...{ guestNs: seconds * SECOND, hostNs: seconds * SECOND, cpuMs: seconds * 1000 },
})

describe('statistics', () => {
  test('medians and geometric means', () => {
    expect(median([3, 1, 2])).toBe(2)
    expect(median([4, 1, 2, 3])).toBe(2.5)
    expect(geometricMean([1, 10, 100])).toBeCloseTo(10)
    expect(geometricMean([7])).toBeCloseTo(7)
  })

  test('a table aligns numbers to the right', () => {
    const rows = [
      ['', 'n'],
      ['one', '1.00'],
      ['three', '–'],
    ]
    expect(table(rows).split('\n')).toEqual(['       n   ', '─────  ────', 'one    1.00', 'three     –'])
  })

  test('numbers have three digits', () => {
    expect([0.123, 9.994, 9.996, 99.94, 99.96, 1234, undefined].map(digits)).toEqual(
      ['0.12', '9.99', '10.0', '99.9', '100', '1234', '–'], //
    )
    expect([0.5, 999, 1500, 2.5e6, 3e9, undefined].map(time)).toEqual(
      ['0.50 ns', '999 ns', '1.50 µs', '2.50 ms', '3.00 s', '–'], //
    )
  })
})

describe('the CPU benchmark', () => {
  const alu = { name: 'alu', group: 'integer', unit: 'round' }
  const fma = { name: 'fma', group: 'vector', unit: 'element' }
  const node = { name: 'node', group: 'programs', unit: 'run', command: ['/usr/bin/node'] }

  test('knows its kernels and programs', () => {
    const all: { name: string; group: string; unit: string; command?: string[] }[] = subjects()
    expect(new Set(all.map(({ name }) => name)).size).toBe(all.length)
    expect(all.find(({ name }) => name === 'rep-movsb')).toEqual({ name: 'rep-movsb', group: 'memory', unit: 'page' })
    expect(orderFor(alu, 300)).toBe('kernel 300 alu')
    expect(orderFor(node, 100)).toBe('program 100 /usr/bin/node')
    // The guest's program takes a line of orders apart at its spaces.
    for (const { command = [] } of all) for (const word of command) expect(word).toMatch(/^\S+$/)
  })

  test('takes the ratio of each round, and their median', () => {
    const samples = [
      // The host was three times slower in the second round.
      ...[sample('alu', 'skep', 1, 2), sample('alu', 'tcg', 1, 4), sample('alu', 'native', 1, 1)],
      ...[sample('alu', 'skep', 2, 6), sample('alu', 'tcg', 2, 12), sample('alu', 'native', 2, 3)],
      { name: 'alu', peer: 'skep', run: 3, error: 'it hung' },
      sample('alu', 'tcg', 3, 100),
    ]
    const [line] = summarise([alu], samples).lines
    expect(line.ratios).toEqual({ tcgToSkep: 2, skepToNative: 2, tcgToNative: 4 })
    expect(line.ns).toEqual({ skep: 4 * SECOND, tcg: 12 * SECOND, native: 2 * SECOND })
    expect(line.failed).toEqual(['skep'])
  })

  test('has means of kernels, vectors and programs', () => {
    const samples = [
      ...[sample('alu', 'skep', 1, 1), sample('alu', 'tcg', 1, 2)],
      ...[sample('fma', 'skep', 1, 1), sample('fma', 'tcg', 1, 8)],
      ...[sample('node', 'skep', 1, 2), sample('node', 'tcg', 1, 1)],
    ]
    const { groups, worstProgram } = summarise([alu, fma, node], samples)
    expect(groups.map(({ name, count }: { name: string; count: number }) => [name, count])).toEqual([
      ['micro kernels', 2],
      ['SSE and AVX', 1],
      ['whole programs', 1],
      ['whole programs, first run', 1],
    ])
    const ratios = groups.map(({ tcgToSkep }: { tcgToSkep: number }) => tcgToSkep)
    for (const [index, wanted] of [4, 8, 0.5, 0.5].entries()) expect(ratios[index]).toBeCloseTo(wanted)
    expect(worstProgram).toEqual({ name: 'node', tcgToSkep: 0.5 })
  })

  test('does not believe a clock that differs from the host’s', () => {
    const slow = { ...sample('alu', 'skep', 1, 1), hostNs: 10 * SECOND }
    expect(perOperation(slow)).toBe(10 * SECOND)
    expect(perOperation({ ...slow, hostNs: 1.01 * SECOND })).toBe(SECOND)
    expect(perOperation(slow, 'cpu')).toBe(SECOND)
    const summary = summarise([alu], [slow, sample('alu', 'tcg', 1, 5)])
    expect(summary.lines[0].ratios.tcgToSkep).toBe(0.5)
    expect(report(summary, ['skep', 'tcg'])).toMatch(/alu .* clock: skep/)
  })

  test('reports what failed, what was left out, and that others were at work', () => {
    const samples = [
      { name: 'fma', peer: 'tcg', run: 1, skipped: 'no AVX2' },
      { name: 'node', peer: 'skep', run: 1, error: 'status 139' },
      { ...sample('alu', 'skep', 1, 1), cpuMs: 500 },
    ]
    const text = report(summarise([alu, fma, node], samples), ['skep', 'tcg'])
    expect(text).toMatch(/fma .* skipped: tcg/)
    expect(text).toMatch(/node .* failed: skep/)
    expect(text).toContain('In 1 of 1 samples')
  })

  test('draws what there is', () => {
    const samples = [sample('alu', 'skep', 1, 1), sample('alu', 'tcg', 1, 2), sample('alu', 'native', 1, 0.5)]
    const about = {
      ...{ cpu: 'A <fast> & hot one', threads: 2, kernel: '6.1', commit: '0123456789abcdef', dirty: false },
      ...{
        qemu: 'QEMU 7.2',
        engine: 'jit',
        date: '2026-01-02T03:04:05.678Z',
        options: { cpus: 1, runs: 3, time: 'wall' },
      },
    }
    const svg = picture(summarise([alu, node], samples), ['skep', 'tcg', 'native'], about)
    expect(svg).toContain('A &lt;fast&gt; &amp; hot one')
    expect(svg).not.toMatch(/NaN|undefined|Infinity/)
    for (const peers of [['skep'], ['skep', 'tcg'], ['skep', 'native']])
      expect(picture(summarise([alu, node], []), peers, about)).not.toMatch(/NaN|undefined|Infinity/)
  })
})

describe('a chart', () => {
  test('has decades as its scale', () => {
    expect(decades(1, 100)).toEqual([1, 10, 100])
    expect(decades(0.5, 101).map((value: number) => Number(value.toPrecision(3)))).toEqual([0.1, 1, 10, 100, 1000])
    expect(decades(1, 1)).toEqual([1, 10])
  })

  test('draws bars from 1, to either side', () => {
    const series = [{ key: 'a', label: 'A', colour: '#123456' }]
    const rows = [
      { label: 'more', values: { a: 10 } },
      { label: 'less', values: { a: 0.1 } },
    ]
    const svg: string = chart({ title: 'T', notes: [], axis: '', column: '', series, groups: [{ title: '', rows }] })
    const [, more, less] = [...svg.matchAll(/<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)".*?fill="#123456"/g)]
    expect(Number(less?.[1]) + Number(less?.[2])).toBeCloseTo(Number(more?.[1]), 0)
  })
})

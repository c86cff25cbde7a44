// The picture of bench/cpu.mjs.
import { chart } from './chart.mjs'
import { digits } from './cpu-report.mjs'

const SKEP = '#e09f00'
const TCG = '#64748b'
const TITLES = {
  integer: 'Integers',
  jumps: 'Calls and jumps',
  memory: 'Memory',
  float: 'Floating point',
  vector: 'SSE and AVX',
  atomic: 'Atomics',
  system: 'The kernel',
  code: 'Code that changes',
  programs: 'Whole programs',
}

/** Against native where that was run, else Skep against TCG. */
export function picture({ lines, groups }, peers, about) {
  const native = peers.includes('native')
  const values = ({ tcgToSkep, skepToNative, tcgToNative }) =>
    native ? { skep: skepToNative, tcg: tcgToNative } : { skep: tcgToSkep }
  const row = (label, ratios, strong) => ({
    ...{ label, strong, values: values(ratios) },
    note: ratios.tcgToSkep && `${digits(ratios.tcgToSkep)}×`,
    good: ratios.tcgToSkep && ratios.tcgToSkep >= 1,
  })
  const parts = Object.entries(TITLES).map(([group, title]) => ({
    title,
    rows: lines.filter((line) => line.group === group).map((line) => row(line.name, line.ratios)),
  }))
  const series = [
    { key: 'skep', label: `Skep, software CPU (${about.engine})`, colour: SKEP },
    ...(native && peers.includes('tcg') ? [{ key: 'tcg', label: 'QEMU TCG', colour: TCG }] : []),
  ]
  return chart({
    title: native ? 'Time in a guest, as a multiple of native time' : "Skep's software CPU against QEMU's TCG",
    notes: [
      `${about.cpu}, ${about.threads} threads, Linux ${about.kernel}; ${about.qemu ?? 'without QEMU'}`,
      `Skep ${about.commit?.slice(0, 10)}${about.dirty ? ' and changes' : ''}; ${about.options.cpus} vCPU; ${about.options.time} time, medians of ${about.options.runs}; ${about.date.slice(0, 10)}`,
    ],
    axis: native
      ? 'times native time, logarithmic: shorter is faster'
      : 'times faster than TCG, logarithmic: longer is better',
    column: peers.includes('tcg') ? 'Skep’s speed, TCG = 1' : '',
    series,
    groups: [
      { title: 'Geometric means', rows: groups.map((group) => row(group.name, group, true)) },
      ...parts.filter(({ rows }) => rows.length > 0),
    ],
  })
}

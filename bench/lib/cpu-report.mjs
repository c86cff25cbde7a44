// What the samples of bench/cpu.mjs say: medians, ratios, geometric means, a table.
import { geometricMean, median, table } from './stats.mjs'

/** A guest's clock may differ from the host's by this much: a part, and the time that lines take to arrive. */
const CLOCK_PART = 0.05
const CLOCK_NS = 20e6

/** Which ratios there are: how many times longer the first takes than the second. */
export const RATIOS = { tcgToSkep: ['tcg', 'skep'], skepToNative: ['skep', 'native'], tcgToNative: ['tcg', 'native'] }

const KERNELS = 'micro kernels'
const SUMMARIES = [
  { name: KERNELS, has: ({ group }) => group !== 'programs' },
  { name: 'SSE and AVX', has: ({ group }) => group === 'vector' },
  { name: 'whole programs', has: ({ group }) => group === 'programs' },
]

/** Whether the guest's clock and the host's have told about the same. */
export const clockAgrees = ({ guestNs, hostNs }) => Math.abs(hostNs - guestNs) <= guestNs * CLOCK_PART + CLOCK_NS

/** Nanoseconds an operation took, by each way of telling: what the process used of the processors does without its waiting. */
const TIMES = {
  // By the guest's clock, unless the host's says otherwise.
  wall: (sample) => (clockAgrees(sample) ? sample.guestNs : sample.hostNs) / sample.operations,
  cpu: (sample) => (sample.cpuMs * 1e6) / sample.operations,
}

export const times = Object.keys(TIMES)
export const perOperation = (sample, time = 'wall') => TIMES[time](sample)

/** Whether a process that had work to do all the time had to wait for a processor. */
const waited = ({ cpuMs, hostNs }) => cpuMs * 1e6 < hostNs * 0.9 - CLOCK_NS

const measured = (sample) => sample?.operations !== undefined

/** The median of the rounds' ratios: the two of one round ran one right after the other. */
function ratio(samples, [above, below], value) {
  const of = (peer) => new Map(samples.filter((one) => one.peer === peer && measured(one)).map((one) => [one.run, one]))
  const over = of(below)
  const pairs = [...of(above)].filter(([run]) => over.has(run))
  const ratios = pairs
    .map(([run, sample]) => value(sample) / value(over.get(run)))
    .filter((ratio) => ratio > 0 && Number.isFinite(ratio))
  return ratios.length > 0 ? median(ratios) : undefined
}

/** One line: a subject, what an operation took under each peer, and the ratios. */
function line(subject, samples, time) {
  const nanoseconds = (sample) => perOperation(sample, time)
  const peers = [...new Set(samples.map(({ peer }) => peer))]
  const ns = {}
  for (const peer of peers) {
    const mine = samples.filter((sample) => sample.peer === peer && measured(sample))
    // Processor time comes in hundredths of a second, and may be none.
    const values = mine.map(nanoseconds).filter((value) => value > 0)
    if (values.length > 0) ns[peer] = median(values)
  }
  const ratios = (value) =>
    Object.fromEntries(Object.entries(RATIOS).map(([name, pair]) => [name, ratio(samples, pair, value)]))
  return {
    ...{ name: subject.name, group: subject.group, unit: subject.unit, about: subject.about },
    ns,
    ratios: ratios(nanoseconds),
    // Of whole programs: the first run of each machine, in which nothing has been translated yet.
    firstRatios: subject.command ? ratios(({ firstNs }) => firstNs) : undefined,
    failed: peers.filter((peer) => samples.some((sample) => sample.peer === peer && sample.error)),
    skipped: peers.filter((peer) => samples.some((sample) => sample.peer === peer && sample.skipped)),
    clockOff: peers.filter((peer) =>
      samples.some((sample) => sample.peer === peer && measured(sample) && !clockAgrees(sample)),
    ),
  }
}

/** Geometric means of the ratios of some lines, each over those that have it. */
function means(lines, of) {
  const result = {}
  for (const name of Object.keys(RATIOS)) {
    const values = lines.map((line) => of(line)?.[name]).filter((value) => value !== undefined)
    if (values.length > 0) result[name] = geometricMean(values)
  }
  return result
}

/**
 * Everything that is concluded from samples.
 * @param {object[]} subjects bench/lib/cpu-programs.mjs
 * @param {object[]} samples `{ name, peer, run }` with what a session gave, or `error`, or `skipped`
 * @param {'wall' | 'cpu'} [time] which time counts
 */
export function summarise(subjects, samples, time = 'wall') {
  const lines = subjects.map((subject) =>
    line(
      subject,
      samples.filter(({ name }) => name === subject.name),
      time,
    ),
  )
  const groups = SUMMARIES.map(({ name, has }) => {
    const members = lines.filter(has)
    return { name, count: members.length, ...means(members, ({ ratios }) => ratios) }
  }).filter(({ count }) => count > 0)
  const programs = lines.filter(({ group }) => group === 'programs')
  if (programs.length > 0) {
    const first = means(programs, ({ firstRatios }) => firstRatios)
    groups.push({ name: 'whole programs, first run', count: programs.length, ...first })
  }
  const compared = programs.filter(({ ratios }) => ratios.tcgToSkep !== undefined)
  const worst = compared.sort((a, b) => a.ratios.tcgToSkep - b.ratios.tcgToSkep)[0]
  // Programs and kernels of the system may wait by themselves.
  const busy = new Set(subjects.filter(({ group }) => !['programs', 'system'].includes(group)).map(({ name }) => name))
  const alone = samples.filter((sample) => measured(sample) && busy.has(sample.name))
  const waiting = { samples: alone.length, waited: alone.filter(waited).length }
  return { lines, groups, waiting, worstProgram: worst && { name: worst.name, tcgToSkep: worst.ratios.tcgToSkep } }
}

/** A time for people, three digits. */
export function time(ns) {
  if (ns === undefined) return '–'
  const [unit, scale] = [
    ['ns', 1],
    ['µs', 1e3],
    ['ms', 1e6],
    ['s', 1e9],
  ].findLast(([, scale]) => ns >= scale) ?? ['ns', 1]
  return `${digits(ns / scale)} ${unit}`
}

/** A number with three digits, or all before the point. */
export function digits(value) {
  if (value === undefined) return '–'
  return value.toFixed(value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2)
}

/** The table for a terminal. */
export function report({ lines, groups, waiting, worstProgram }, peers) {
  const ratios = Object.keys(RATIOS).filter((name) => RATIOS[name].every((peer) => peers.includes(peer)))
  const titles = { tcgToSkep: 'tcg/skep', skepToNative: 'skep/native', tcgToNative: 'tcg/native' }
  const notes = ({ failed, skipped, clockOff }) =>
    [
      failed.length > 0 && `failed: ${failed.join(', ')}`,
      skipped.length > 0 && `skipped: ${skipped.join(', ')}`,
      clockOff.length > 0 && `clock: ${clockOff.join(', ')}`,
    ]
      .filter(Boolean)
      .join('; ')
  const rows = [['', 'of', ...peers, ...ratios.map((name) => titles[name]), '']]
  for (const line of lines) {
    const values = ratios.map((name) => digits(line.ratios[name]))
    rows.push([line.name, line.unit, ...peers.map((peer) => time(line.ns[peer])), ...values, notes(line)])
  }
  const summary = [['geometric means', '', ...ratios.map((name) => titles[name])]]
  for (const group of groups) summary.push([group.name, group.count, ...ratios.map((name) => digits(group[name]))])
  const text = [table(rows), table(summary)]
  if (worstProgram) text.push(`Worst whole program: ${worstProgram.name}, tcg/skep ${digits(worstProgram.tcgToSkep)}.`)
  if (lines.some(({ clockOff }) => clockOff.length > 0))
    text.push("clock: the guest's and the host's differ; the host's was taken.")
  if (waiting.waited > 0)
    text.push(
      `In ${waiting.waited} of ${waiting.samples} samples the processors were busy with other work, too: measure on a quiet machine.`,
    )
  return text.join('\n\n')
}

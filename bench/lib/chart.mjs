// Bars on a logarithmic scale, as SVG.

const FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
const INK = '#1f2937'
const FAINT = '#6b7280'
const GRID = '#e5e7eb'
const WIDTH = 960
const LEFT = 190
const RIGHT = 120
const MARGIN = 28
const BAR = 8
const GAP = 2
const ROW = 8

const escaped = (text) =>
  String(text).replace(/[<>&"]/g, (c) => ({ '<': '&lt;', '>': '&gt;', '&': '&amp;', '"': '&quot;' })[c])

const text = (x, y, content, { size = 11, fill = INK, anchor = 'start', weight = 400 } = {}) =>
  `<text x="${round(x)}" y="${round(y)}" font-size="${size}" fill="${fill}" text-anchor="${anchor}" font-weight="${weight}">${escaped(content)}</text>`

const round = (value) => Math.round(value * 10) / 10

/** Powers of ten from the one below `low` to the one above `high`. */
export function decades(low, high) {
  const first = Math.floor(Math.log10(low) + 1e-9)
  const last = Math.max(Math.ceil(Math.log10(high) - 1e-9), first + 1)
  return Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i))
}

/**
 * A chart of groups of rows; every row has a bar for each series, from 1 to its value.
 * @param {object} chart
 * @param {string} chart.title
 * @param {string[]} chart.notes lines below the title
 * @param {string} chart.axis what the values are
 * @param {string} chart.column title of the rows' notes
 * @param {{ key: string, label: string, colour: string }[]} chart.series
 * @param {{ title: string, rows: { label: string, values: Record<string, number | undefined>, note?: string, good?: boolean, strong?: boolean }[] }[]} chart.groups
 * @returns {string}
 */
export function chart({ title, notes, axis, column, series, groups }) {
  const values = groups
    .flatMap(({ rows }) => rows.flatMap((row) => Object.values(row.values)))
    .filter((value) => value > 0)
  const ticks = decades(Math.min(1, ...values), Math.max(10, ...values))
  const width = WIDTH - LEFT - RIGHT - MARGIN
  const most = Math.min(ticks.at(-1), Math.max(10, ...values) * 1.2)
  const least = Math.max(ticks[0], Math.min(1, ...values) / 1.2)
  const scale = (value) => LEFT + (Math.log(value / least) / Math.log(most / least)) * width
  const row = series.length * (BAR + GAP) + ROW

  const parts = [text(MARGIN, 40, title, { size: 20, weight: 700 })]
  let y = 40
  for (const note of notes) {
    y += 18
    parts.push(text(MARGIN, y, note, { fill: FAINT }))
  }
  y += 26
  let x = MARGIN
  for (const { label, colour } of series) {
    parts.push(`<rect x="${x}" y="${y - 9}" width="10" height="10" rx="2" fill="${colour}"/>`, text(x + 16, y, label))
    x += 40 + label.length * 6.2
  }
  y += 26
  parts.push(text(LEFT, y, axis, { fill: FAINT }), text(WIDTH - MARGIN, y, column, { fill: FAINT, anchor: 'end' }))
  y += 18
  const numbers = y
  y += 8
  const top = y
  const bars = []
  for (const { title, rows } of groups) {
    bars.push(text(MARGIN, y + 16, title, { weight: 700, size: 12 }))
    y += 26
    for (const { label, values, note, good, strong } of rows) {
      const middle = y + (row - ROW) / 2 + 4
      bars.push(text(LEFT - 10, middle, label, { anchor: 'end', weight: strong ? 700 : 400 }))
      for (const [index, { key, colour }] of series.entries()) {
        const value = values[key]
        const at = y + index * (BAR + GAP)
        if (value === undefined) {
          bars.push(text(scale(1) + 4, at + BAR - 1, '–', { size: 9, fill: FAINT }))
          continue
        }
        const [from, to] = [scale(1), scale(value)].sort((a, b) => a - b)
        const bar = `x="${round(from)}" y="${at}" width="${round(Math.max(to - from, 1.5))}" height="${BAR}" rx="1.5" fill="${colour}"`
        bars.push(`<rect ${bar}><title>${escaped(`${label}: ${shown(value)}`)}</title></rect>`)
        bars.push(text(to + 4, at + BAR - 0.5, shown(value), { size: 9, fill: FAINT }))
      }
      if (note) {
        const fill = good === undefined ? INK : good ? '#15803d' : '#b91c1c'
        bars.push(text(WIDTH - MARGIN, middle, note, { anchor: 'end', weight: 600, fill }))
      }
      y += row
    }
    y += 6
  }
  const grid = []
  const within = (value) => value >= least && value <= most
  for (const tick of ticks) {
    const at = round(scale(tick))
    if (within(tick)) {
      const stroke = tick === 1 ? FAINT : GRID
      grid.push(`<line x1="${at}" y1="${top}" x2="${at}" y2="${y}" stroke="${stroke}" stroke-width="1"/>`)
      grid.push(text(at, numbers, `${shown(tick)}×`, { anchor: 'middle', fill: FAINT, size: 10 }))
    }
    for (const minor of [2 * tick, 5 * tick].filter(within).map(scale).map(round)) {
      grid.push(`<line x1="${minor}" y1="${top}" x2="${minor}" y2="${y}" stroke="${GRID}" stroke-width="0.5"/>`)
    }
  }
  const height = Math.ceil(y + MARGIN)
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${height}" viewBox="0 0 ${WIDTH} ${height}" font-family="${FONT}">
<rect width="${WIDTH}" height="${height}" fill="#ffffff"/>
${[...parts, ...grid, ...bars].join('\n')}
</svg>
`
}

/** A ratio in as few characters as will do. */
function shown(value) {
  if (value >= 9.95) return value.toFixed(0)
  if (value >= 0.995) return value.toFixed(1).replace(/\.0$/, '')
  return value.toPrecision(1)
}

// Small statistics over samples of a few runs.

/** The middle sample (mean of the two middle ones). */
export function median(samples) {
  const sorted = [...samples].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
}

/** The geometric mean of positive numbers. */
export const geometricMean = (samples) =>
  Math.exp(samples.reduce((sum, sample) => sum + Math.log(sample), 0) / samples.length)

/** A table for a terminal: first row is the heading, numbers are right-aligned. */
export function table(rows) {
  const widths = rows[0].map((_, column) => Math.max(...rows.map((row) => String(row[column]).length)))
  const line = (row) =>
    row
      .map((cell, i) =>
        typeof cell === 'number' || /^[\d.–-]/.test(cell)
          ? String(cell).padStart(widths[i])
          : String(cell).padEnd(widths[i]),
      )
      .join('  ')
  return [line(rows[0]), widths.map((width) => '─'.repeat(width)).join('  '), ...rows.slice(1).map(line)].join('\n')
}

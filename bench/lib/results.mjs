// Where results are kept.
import { mkdirSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { root } from '../../scripts/lib/paths.mjs'

/** The file in bench/results for the results of this kind that were begun at `date`. */
export const resultFile = (kind, date, suffix = 'json') =>
  join(root, 'bench/results', `${kind}-${date.replaceAll(':', '')}.${suffix}`)

/** Writes a file, and the folder for it; its path. */
export function keep(file, text) {
  mkdirSync(dirname(file), { recursive: true })
  writeFileSync(file, text)
  return file
}

/** Writes results as JSON to `file`; its path. */
export const keepJson = (file, results) => keep(file, `${JSON.stringify(results, null, 2)}\n`)

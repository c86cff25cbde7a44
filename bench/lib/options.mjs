// Values of the benchmarks' options, checked: what is wrong ends the command with status 2.
import { Failure } from '../../scripts/lib/run.mjs'

/** A whole number of at least 1. */
export function whole(text, name) {
  const number = Number(text)
  if (!Number.isInteger(number) || number < 1)
    throw new Failure(`--${name} ${text}: a whole number of at least 1 is wanted`, 2)
  return number
}

/** Names with commas between them, all of which are known. */
export function chosenOf(text, known, name) {
  const chosen = text.split(',')
  const unknown = chosen.filter((one) => !known.includes(one))
  if (unknown.length > 0) throw new Failure(`--${name} ${unknown.join()}: there are ${known.join(', ')}`, 2)
  return chosen
}

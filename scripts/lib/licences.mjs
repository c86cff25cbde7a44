// Which licences may come in.

/** Permissive licences, which ask for no more than their own text. deny.toml holds the same list for cargo-deny. */
export const ALLOWED = new Set([
  '0BSD',
  'Apache-2.0',
  'Apache-2.0 WITH LLVM-exception',
  'BSD-2-Clause',
  'BSD-3-Clause',
  'BlueOak-1.0.0',
  'CC0-1.0',
  'ISC',
  'MIT',
  'MIT-0',
  'Python-2.0',
  'Unicode-3.0',
  'Unlicense',
  'Zlib',
])

/** Tools that are run while developing and never shipped or linked; for these file-level copyleft is fine too. */
export const ALLOWED_FOR_TOOLS = new Set([...ALLOWED, 'MPL-2.0', 'PSF-2.0', 'CC-BY-4.0', 'CC-BY-3.0'])

/** True if an SPDX expression can be satisfied with `allowed`. OR binds weaker than AND; parentheses as usual. */
export function satisfies(expression, allowed) {
  const tokens = expression.replaceAll('/', ' OR ').match(/\(|\)|[^\s()]+/g) ?? []
  let at = 0
  const either = () => {
    let result = both()
    while (tokens[at] === 'OR') {
      at += 1
      const right = both()
      result ||= right
    }
    return result
  }
  const both = () => {
    let result = one()
    while (tokens[at] === 'AND') {
      at += 1
      const right = one()
      result &&= right
    }
    return result
  }
  const one = () => {
    if (tokens[at] === '(') {
      at += 1
      const inner = either()
      at += 1
      return inner
    }
    let id = tokens[at++] ?? ''
    if (tokens[at] === 'WITH') {
      id = `${id} WITH ${tokens[at + 1]}`
      at += 2
    }
    return allowed.has(id)
  }
  return tokens.length > 0 && either() && at === tokens.length
}

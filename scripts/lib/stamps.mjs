// A step is done again only when what it reads has changed: its stamp holds a hash of every input's content, so
// touching a file or switching branches and back costs nothing.
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { root, state } from './paths.mjs'

const LEFT_OUT = new Set(['target', 'node_modules', 'dist', '.git'])

function* files(path) {
  const stat = statSync(path, { throwIfNoEntry: false })
  if (!stat) return
  if (stat.isFile()) yield path
  else if (stat.isDirectory()) {
    for (const name of readdirSync(path).sort()) if (!LEFT_OUT.has(name)) yield* files(join(path, name))
  }
}

/** Hash of files and folders (relative to the checkout) and of any further `facts`. */
export function fingerprint(inputs, facts = []) {
  const hash = createHash('sha256')
  for (const input of inputs) {
    for (const file of files(join(root, input))) {
      const content = readFileSync(file)
      hash.update(`${file.slice(root.length)}\0${content.length}\0`).update(content)
    }
  }
  return hash.update(JSON.stringify(facts)).digest('hex')
}

/**
 * Does `work` unless it was done for this `print` and its `outputs` are still there.
 * @returns {Promise<boolean>} true if the work was done now
 */
export async function unlessDone(name, print, outputs, work) {
  const stamp = join(state, `${name}.stamp`)
  const done = existsSync(stamp) && readFileSync(stamp, 'utf8') === print
  if (done && outputs.every((path) => existsSync(join(root, path)))) return false
  rmSync(stamp, { force: true })
  await work()
  mkdirSync(state, { recursive: true })
  writeFileSync(stamp, print)
  return true
}

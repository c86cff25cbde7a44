// Where things are. All that the scripts leave behind is under node_modules, target and dist, which git ignores.
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

/** The checkout. */
export const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))))
/** Stamps and logs. */
export const state = join(root, 'node_modules', '.cache', 'skep')
/** Full output of every step. */
export const logs = join(state, 'logs')
/** Programs that npm installed. */
export const bin = (name) => join(root, 'node_modules', '.bin', name)

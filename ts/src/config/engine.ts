/** Engines of the software CPU: which there are, and which one runs a machine. */
import { ConfigError } from '../errors.js'
import { didYouMean } from './suggest.js'
import type { Engine, MachineSpec } from './types.js'

/** All engines. */
export const engines: readonly Engine[] = ['jit', 'interpreter', 'lockstep']

/** The variable of the environment that names the engine of machines whose configuration does not. */
const variable = 'SKEP_ENGINE'

/** Whether a configuration names an engine, rather than leaving it open. */
export function isEngine(engine: Engine | 'auto' | null | undefined): engine is Engine {
  return engine !== undefined && engine !== null && engine !== 'auto'
}

/**
 * What `engine: 'auto'` is in this process, and why.
 *
 * @throws ConfigError `ERR_CONFIG_ENGINE` if the environment names an engine that does not exist.
 */
export function defaultEngine(): { auto: Engine; reason: string } {
  const value = process.env[variable]
  if (value === undefined || value === '' || value === 'auto') {
    return { auto: 'jit', reason: 'translates guest code, and leaves to the interpreter what is not worth it' }
  }
  const engine = engines.find((name) => name === value)
  if (engine !== undefined) return { auto: engine, reason: `${variable} in the environment asks for it` }
  const shown = JSON.stringify(value.slice(0, 60))
  const message = `the environment variable ${variable}: expected auto, ${engines.join(', ')} or nothing, got ${shown}`
  throw new ConfigError('ERR_CONFIG_ENGINE', message + didYouMean(value, engines), { details: { variable } })
}

/**
 * The engine of a machine of the software CPU with so many processors.
 *
 * @throws ConfigError `ERR_CONFIG_ENGINE` if it cannot run that machine, or as {@link defaultEngine}.
 */
export function engineFor(given: Engine | 'auto' | null | undefined, cpus: MachineSpec['cpus']): Engine {
  const engine = isEngine(given) ? given : defaultEngine().auto
  const count = cpus.sockets * cpus.cores * cpus.threads
  if (engine === 'lockstep' && count !== 1) {
    const source = isEngine(given) ? '' : ` (from ${variable} in the environment)`
    const message = `engine: "lockstep"${source} runs one processor, and cpus makes ${count}; give cpus 1, or engine "jit"`
    throw new ConfigError('ERR_CONFIG_ENGINE', message, { path: 'engine' })
  }
  return engine
}

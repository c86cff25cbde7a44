/** Configuration files. */
import { readFile } from 'node:fs/promises'
import { ConfigError } from '../errors.js'
import type { VmConfig } from './types.js'
import { validate } from './validate.js'

/** Largest configuration file taken, in bytes. */
const maxFile = 1 << 20

/** Reads a JSON file as any JSON object, without checking it as a configuration. */
export async function readConfig(file: string): Promise<unknown> {
  let text: string
  try {
    const content = await readFile(file)
    if (content.length > maxFile) throw new Error(`the file has ${content.length} bytes, at most ${maxFile} are read`)
    text = content.toString('utf8')
  } catch (cause) {
    const message = `cannot read the configuration ${file}: ${reason(cause)}`
    throw new ConfigError('ERR_CONFIG_FILE', message, { cause, details: { file } })
  }
  try {
    return JSON.parse(text)
  } catch (cause) {
    const message = `${file} is not JSON: ${reason(cause)}`
    throw new ConfigError('ERR_CONFIG_FILE', message, { cause, details: { file } })
  }
}

/** Reads and checks a configuration file. Relative paths in it start from the folder that {@link resolve} is given. */
export async function loadConfig(file: string): Promise<VmConfig> {
  return validate(await readConfig(file))
}

function reason(cause: unknown): string {
  if (!(cause instanceof Error)) return String(cause)
  const { code } = cause as NodeJS.ErrnoException
  if (code === 'ENOENT') return 'there is no such file'
  if (code === 'EISDIR') return 'it is a folder'
  if (code === 'EACCES') return 'it may not be read'
  return cause.message
}

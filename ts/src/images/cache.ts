/** Where things are kept: the XDG cache. */
import { homedir } from 'node:os'
import { isAbsolute, join } from 'node:path'

/** The cache of this package: `$XDG_CACHE_HOME/skep`, by default `~/.cache/skep`. */
export function cacheFolder(): string {
  const xdg = process.env['XDG_CACHE_HOME']
  // The XDG Base Directory Specification has relative paths ignored.
  const base = xdg !== undefined && isAbsolute(xdg) ? xdg : join(homedir(), '.cache')
  return join(base, 'skep')
}

/** The folder of the prepared images. */
export function imagesFolder(): string {
  return join(cacheFolder(), 'images')
}

/** The folder of apt's state. */
export function aptFolder(): string {
  return join(cacheFolder(), 'apt')
}

/**
 * Debian packages by name, through apt and without root: apt reads the sources and keys of the host, and keeps its own
 * state in a folder of ours.
 *
 * @module
 */
import { mkdir, readdir, rm, stat, utimes, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { ImageError } from '../errors.js'
import type { Abortable } from '../signal.js'
import { aptFolder } from './cache.js'
import { withLock } from './lock.js'
import { pipeTools, runTool, toolFailure } from './tools.js'

/** A line of progress. */
export interface Progress {
  /** What is being done, for a person. */
  message: string
}

/** How packages are fetched. */
export interface FetchOptions extends Abortable {
  /** Folder to unpack into. */
  into: string
  /** Whether to fetch all they depend on as well. Default `false`. */
  dependencies?: boolean | undefined
  /** Paths to unpack, as tar's patterns (`./boot/*`). Default: everything. */
  paths?: readonly string[] | undefined
  /** Whether to fetch the lists of packages anew even when they are recent. */
  refresh?: boolean | undefined
  onProgress?: ((progress: Progress) => void) | undefined
}

/** A package as it was fetched. */
export interface FetchedPackage {
  name: string
  version: string
}

/** Lists older than this are fetched again, in milliseconds. */
const maxAge = 24 * 60 * 60 * 1000

/** apt's options that keep it in `folder`, without root, and to what is needed. */
function aptOptions(folder: string): string[] {
  const settings = {
    'Dir::State': join(folder, 'state'),
    'Dir::State::status': join(folder, 'state/status'),
    'Dir::State::extended_states': join(folder, 'state/extended_states'),
    'Dir::Cache': join(folder, 'cache'),
    // Locks and the download user need root; our own lock keeps two of us apart.
    'Debug::NoLocking': 'true',
    'APT::Sandbox::User': '',
    'APT::Install-Recommends': 'false',
    'Acquire::Languages': 'none',
    'Acquire::Retries': '3',
    'Acquire::http::Timeout': '30',
    'Acquire::https::Timeout': '30',
    'Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled': 'false',
    'Acquire::IndexTargets::deb::DEP-11::DefaultEnabled': 'false',
    'Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled': 'false',
    'Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled': 'false',
    'Acquire::IndexTargets::deb-src::Sources::DefaultEnabled': 'false',
    // What an administrator runs after apt is not ours to run.
    'APT::Update::Post-Invoke-Success': '',
    'APT::Update::Post-Invoke': '',
    'DPkg::Post-Invoke': '',
  }
  return Object.entries(settings).flatMap(([key, value]) => ['-o', `${key}=${value}`])
}

/** apt, with the lists of packages in a folder of ours. */
export class Apt {
  readonly #folder: string
  readonly #options: readonly string[]

  private constructor(folder: string) {
    this.#folder = folder
    this.#options = aptOptions(folder)
  }

  /** Makes the folder ready and the lists recent. */
  static async open(
    options: Abortable & {
      refresh?: boolean | undefined
      onProgress?: ((progress: Progress) => void) | undefined
    } = {},
  ): Promise<Apt> {
    const folder = aptFolder()
    await mkdir(join(folder, 'state/lists/partial'), { recursive: true })
    await mkdir(join(folder, 'cache/archives/partial'), { recursive: true })
    // No package is installed, as far as this apt knows: what others depend on is never left out.
    await writeFile(join(folder, 'state/status'), '')
    const apt = new Apt(folder)
    await withLock(join(folder, 'lock'), { signal: options.signal }, () => apt.#update(options))
    return apt
  }

  /** The version that would be fetched and what it depends on by name, or `undefined` if there is no such package. */
  async show(name: string, signal?: AbortSignal): Promise<{ version: string; depends: string[] } | undefined> {
    const result = await runTool('apt-cache', [...this.#options, 'show', '--no-all-versions', name], { signal })
    const field = (key: string): string | undefined => new RegExp(`^${key}: (.*)$`, 'm').exec(result.stdout)?.[1]
    const version = field('Version')
    if (result.status !== 0 || version === undefined) return undefined
    const depends = (field('Depends') ?? '').split(',').map((item) => item.trim().split(/[\s(:|]/)[0] ?? '')
    return { version, depends: depends.filter((item) => item !== '') }
  }

  /** Names and versions of `names` and all that they depend on, in apt's own resolution. */
  async closure(names: readonly string[], signal?: AbortSignal): Promise<FetchedPackage[]> {
    const args = [...this.#options, 'install', '--simulate', '--no-install-recommends', '--yes', ...names]
    const result = await runTool('apt-get', args, { signal })
    if (result.status !== 0) throw toolFailure('apt-get install --simulate', result)
    const lines = result.stdout.matchAll(/^Inst (\S+) \((\S+) /gm)
    return [...lines].map(([, name = '', version = '']) => ({ name, version }))
  }

  /** Downloads packages, verified against apt's signed lists; the paths of the files. */
  async download(
    packages: readonly FetchedPackage[],
    folder: string,
    options: Abortable & { onProgress?: ((progress: Progress) => void) | undefined } = {},
  ): Promise<string[]> {
    const { signal, onProgress } = options
    await mkdir(folder, { recursive: true })
    const args = [...this.#options, 'download', ...packages.map(({ name, version }) => `${name}=${version}`)]
    const result = await runTool('apt-get', args, { signal, cwd: folder, onLine: say(onProgress, 'downloading') })
    if (result.status !== 0) throw toolFailure('apt-get download', result)
    const files = (await readdir(folder)).filter((file) => file.endsWith('.deb')).sort()
    return files.map((file) => join(folder, file))
  }

  async #update(
    options: Abortable & { refresh?: boolean | undefined; onProgress?: ((progress: Progress) => void) | undefined },
  ): Promise<void> {
    const { signal, refresh, onProgress } = options
    const stamp = join(this.#folder, 'state/updated')
    const age = await stat(stamp).then(
      ({ mtimeMs }) => Date.now() - mtimeMs,
      () => Number.POSITIVE_INFINITY,
    )
    if (!refresh && age >= 0 && age < maxAge) return
    onProgress?.({ message: "reading the lists of Debian's packages" })
    const result = await runTool('apt-get', [...this.#options, 'update'], {
      signal,
      onLine: say(onProgress, 'reading lists'),
    })
    if (result.status !== 0) throw toolFailure('apt-get update', result)
    // Sources that fail are no more than warnings to apt. If it got nothing at all that is the reason to give.
    const lists = await readdir(join(this.#folder, 'state/lists'))
    if (!lists.some((file) => /_Packages(\.\w+)?$/.test(file))) throw toolFailure('apt-get update', result)
    await writeFile(stamp, '')
    const now = new Date()
    await utimes(stamp, now, now)
  }
}

function say(onProgress: ((progress: Progress) => void) | undefined, doing: string): (line: string) => void {
  return (line) => {
    const got = /^(?:Get|Hit|Ign):\d+ (.*)$/.exec(line)?.[1]
    if (got) onProgress?.({ message: `${doing}: ${got}` })
  }
}

/**
 * Fetches Debian packages by name and unpacks them into a folder; nothing is installed, and no script of theirs is run.
 *
 * @returns the packages with their versions.
 * @throws ImageError that says which tool, package or connection is missing.
 */
export async function fetchDebianPackages(names: readonly string[], options: FetchOptions): Promise<FetchedPackage[]> {
  const { signal, onProgress, into, paths = [] } = options
  const apt = await Apt.open(options)
  const packages = options.dependencies
    ? await apt.closure(names, signal)
    : await Promise.all(names.map((name) => candidate(apt, name, signal)))
  await mkdir(into, { recursive: true })
  const folder = join(into, `.debs-${process.pid}-${Date.now()}`)
  try {
    onProgress?.({ message: `downloading ${packages.map(({ name }) => name).join(', ')}` })
    const files = await apt.download(packages, folder, { signal, onProgress })
    for (const file of files) {
      onProgress?.({ message: `unpacking ${file.slice(folder.length + 1).split('_')[0]}` })
      await unpack(file, into, paths, signal)
    }
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
  return packages
}

async function candidate(apt: Apt, name: string, signal: AbortSignal | undefined): Promise<FetchedPackage> {
  const found = await apt.show(name, signal)
  if (found) return { name, version: found.version }
  const message = `the host's package sources have no package ${name}; add a Debian source to apt (see docs/images.md)`
  throw new ImageError('ERR_IMAGE_PACKAGE', message, { details: { package: name } })
}

async function unpack(
  deb: string,
  into: string,
  paths: readonly string[],
  signal: AbortSignal | undefined,
): Promise<void> {
  const tar: [string, ...string[]] = [
    'tar',
    '--extract',
    '--directory',
    into,
    '--no-same-owner',
    '--delay-directory-restore',
  ]
  if (paths.length > 0) tar.push('--wildcards', '--no-anchored', ...paths)
  await pipeTools(['dpkg-deb', '--fsys-tarfile', deb], tar, { signal })
}

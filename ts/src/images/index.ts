/**
 * Guest images: a kernel and an initramfs by name, made once and kept.
 *
 * @module
 */
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { mkdir, open, readdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { didYouMean } from '../config/suggest.js'
import { ImageError } from '../errors.js'
import type { Abortable } from '../signal.js'
import type { Progress } from './apt.js'
import { imagesFolder } from './cache.js'
import { debianCloud, hashOf } from './debian.js'
import { withLock } from './lock.js'
import type { Recipe } from './recipe.js'

const recipes: Readonly<Record<string, Recipe>> = { 'debian-cloud': debianCloud }

/** The image that is booted where none is named. */
export const defaultImage = 'debian-cloud'

/** An image that is ready. */
export interface Image {
  /** Name of the image. */
  name: string
  /** Folder it is in. */
  folder: string
  /** Path of the kernel. */
  kernel: string
  /** Path of the initramfs. */
  initrd: string
  /** Kernel command line to boot with. */
  cmdline: string
  /** What the guest prints when it waits for a command. */
  prompt: string
  /** Debian's packages it is made of, with versions. */
  packages: Record<string, string>
}

/** A name for which there is a recipe, and the image if it has been prepared. */
export interface ImageInfo {
  /** Name of the image. */
  name: string
  /** One line for a person. */
  about: string
  /** The image, if it is there. */
  image?: Image | undefined
  /** Bytes it takes, if it is there. */
  size?: number | undefined
}

/** How an image is prepared. */
export interface PrepareOptions extends Abortable {
  /** Whether to make it anew, of the packages of today. Default `false`. */
  refresh?: boolean | undefined
  /** Is told what is being done. */
  onProgress?: ((progress: Progress) => void) | undefined
}

interface Manifest {
  version: 1
  name: string
  packages: Record<string, string>
  files: Record<string, { size: number; sha256: string }>
}

const manifestFile = 'manifest.json'
const imageFiles = ['kernel', 'initrd'] as const

/**
 * Prepares an image, or finds it as it was prepared before: the second time takes no network. What is found is checked
 * against its checksums. Processes that prepare the same image at the same time wait for one another.
 *
 * @throws ImageError, with the reason as its code.
 *
 * @example
 * ```ts
 * const { kernel, initrd, cmdline } = await prepareImage('debian-cloud', { onProgress: ({ message }) => console.error(message) })
 * await using vm = await Vm.create({ memory: '512M', boot: { kernel, initrd, cmdline } })
 * ```
 */
export async function prepareImage(name: string = defaultImage, options: PrepareOptions = {}): Promise<Image> {
  const { signal, refresh, onProgress } = options
  const recipe = recipeOf(name)
  signal?.throwIfAborted()
  if (!refresh) {
    const image = await find(name, recipe, signal)
    if (image) return image
  }
  try {
    const onWait = (pid: number): void => onProgress?.({ message: `waiting for process ${pid}, which prepares it too` })
    return await withLock(`${folderOf(name, recipe)}.lock`, { signal, onWait }, async () => {
      const image = refresh ? undefined : await find(name, recipe, signal)
      return image ?? (await make(name, recipe, options))
    })
  } catch (error) {
    signal?.throwIfAborted()
    throw diskError(error)
  }
}

/** All images there are recipes for. */
export async function listImages(options: Abortable = {}): Promise<ImageInfo[]> {
  return await Promise.all(
    Object.entries(recipes).map(async ([name, recipe]) => {
      const image = await find(name, recipe, options.signal)
      if (!image) return { name, about: recipe.about }
      const sizes = await Promise.all(imageFiles.map((file) => stat(image[file])))
      return { name, about: recipe.about, image, size: sizes.reduce((sum, { size }) => sum + size, 0) }
    }),
  )
}

/** The image if it has been prepared and is whole. */
export async function findImage(name: string = defaultImage, options: Abortable = {}): Promise<Image | undefined> {
  return await find(name, recipeOf(name), options.signal)
}

/** Removes all that has been prepared under a name, by this version and by others; says whether there was anything. */
export async function removeImage(name: string, options: Abortable = {}): Promise<boolean> {
  const recipe = recipeOf(name)
  return await withLock(`${folderOf(name, recipe)}.lock`, options, async () => {
    const own = new RegExp(`^(\\.tmp-)?${name}-[\\da-f]{12}(-\\w+)?$`)
    const folders = (await names(imagesFolder())).filter((folder) => own.test(folder))
    for (const folder of folders) await rm(join(imagesFolder(), folder), { recursive: true, force: true })
    return folders.some((folder) => !folder.startsWith('.'))
  })
}

function recipeOf(name: string): Recipe {
  const recipe = Object.hasOwn(recipes, name) ? recipes[name] : undefined
  if (recipe) return recipe
  const hint = didYouMean(name, Object.keys(recipes)) || `; there is ${Object.keys(recipes).join(', ')}`
  throw new ImageError('ERR_IMAGE_UNKNOWN', `there is no image "${name}"${hint}`, { details: { name } })
}

function folderOf(name: string, recipe: Recipe): string {
  return join(imagesFolder(), `${name}-${hashOf(recipe)}`)
}

async function find(name: string, recipe: Recipe, signal: AbortSignal | undefined): Promise<Image | undefined> {
  const folder = folderOf(name, recipe)
  try {
    const manifest = JSON.parse(await readFile(join(folder, manifestFile), 'utf8')) as Manifest
    for (const file of imageFiles) {
      const { size, sha256 } = await measure(join(folder, file), signal)
      if (size !== manifest.files[file]?.size || sha256 !== manifest.files[file]?.sha256) return undefined
    }
    return imageIn(folder, recipe, manifest)
  } catch {
    signal?.throwIfAborted()
    // Not there, or not whole: then it is made anew.
    return undefined
  }
}

function imageIn(folder: string, recipe: Recipe, manifest: Manifest): Image {
  const { cmdline, prompt } = recipe
  const { name, packages } = manifest
  return { name, folder, kernel: join(folder, 'kernel'), initrd: join(folder, 'initrd'), cmdline, prompt, packages }
}

/** Makes an image in a folder aside and moves it into place when it is whole. The lock is held. */
async function make(name: string, recipe: Recipe, options: PrepareOptions): Promise<Image> {
  const folder = folderOf(name, recipe)
  await mkdir(imagesFolder(), { recursive: true })
  const aside = join(imagesFolder(), `.tmp-${name}-${hashOf(recipe)}`)
  // Left there by a process that was killed: nobody else has the lock.
  await rm(aside, { recursive: true, force: true })
  await mkdir(aside)
  try {
    const packages = await recipe.make(aside, options)
    const files: Manifest['files'] = {}
    for (const file of imageFiles) files[file] = await measure(join(aside, file), options.signal)
    const manifest: Manifest = {
      version: 1,
      name,
      packages: Object.fromEntries(packages.map((one) => [one.name, one.version])),
      files,
    }
    await writeFile(join(aside, manifestFile), `${JSON.stringify(manifest, null, 2)}\n`)
    for (const file of [...imageFiles, manifestFile]) await flush(join(aside, file))
    await rm(folder, { recursive: true, force: true })
    await rename(aside, folder)
    return imageIn(folder, recipe, manifest)
  } catch (error) {
    await rm(aside, { recursive: true, force: true }).catch(() => {})
    throw error
  }
}

async function measure(file: string, signal: AbortSignal | undefined): Promise<{ size: number; sha256: string }> {
  const hash = createHash('sha256')
  await pipeline(createReadStream(file, { highWaterMark: 1 << 20 }), hash, {
    signal: signal ?? new AbortController().signal,
  })
  const { size } = await stat(file)
  return { size, sha256: hash.digest('hex') }
}

async function flush(file: string): Promise<void> {
  const handle = await open(file, 'r')
  try {
    await handle.sync()
  } finally {
    await handle.close()
  }
}

async function names(folder: string): Promise<string[]> {
  return await readdir(folder).catch(() => [])
}

/** Errors of the file system, as what they mean here. */
function diskError(error: unknown): unknown {
  const { code, message } = error as NodeJS.ErrnoException
  if (code === undefined || !/^(ENOSPC|EDQUOT|EROFS|EACCES|EPERM|ENOTDIR|EIO|ENAMETOOLONG)$/.test(code)) return error
  const hint = code === 'ENOSPC' || code === 'EDQUOT' ? 'make room' : 'see that it may be written'
  return new ImageError(
    'ERR_IMAGE_DISK',
    `the cache ${imagesFolder()} cannot be written: ${message}; ${hint}, or set XDG_CACHE_HOME`,
    {
      cause: error,
    },
  )
}

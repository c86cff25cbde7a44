/** `skep image`: guests ready made. */
import { defaultImage, findImage, listImages, prepareImage, removeImage } from '../../images/index.js'
import { type Context, print, status } from '../context.js'
import { Progress } from '../progress.js'

/** `skep image list`. */
export async function imageList(options: { json?: boolean }, context: Context): Promise<number> {
  const images = await listImages({ signal: context.signal })
  if (options.json) {
    await print(context.stdout, `${JSON.stringify(images, null, 2)}\n`)
    return status.ok
  }
  for (const { name, about, image, size } of images) {
    const ready = image ? `prepared, ${((size ?? 0) / 2 ** 20).toFixed(1)} MiB` : 'not prepared'
    await print(context.stdout, `${name}${name === defaultImage ? ' (default)' : ''}  ${ready}\n  ${about}\n`)
    for (const [name, version] of Object.entries(image?.packages ?? {})) {
      await print(context.stdout, `  ${name} ${version}\n`)
    }
  }
  return status.ok
}

/** `skep image prepare`. */
export async function imagePrepare(
  name: string,
  options: { refresh?: boolean; json?: boolean },
  context: Context,
): Promise<number> {
  const progress = new Progress(context.stderr)
  try {
    const image = await prepareImage(name, {
      signal: context.signal,
      refresh: options.refresh,
      onProgress: ({ message }) => progress.show(`${name}: ${message}`),
    })
    progress.clear()
    await print(context.stdout, options.json ? `${JSON.stringify(image, null, 2)}\n` : `${image.folder}\n`)
  } finally {
    progress.clear()
  }
  return status.ok
}

/** `skep image path`. */
export async function imagePath(name: string, options: { json?: boolean }, context: Context): Promise<number> {
  const image = await findImage(name, { signal: context.signal })
  if (!image) {
    context.stderr.write(`skep: image ${name} is not prepared; skep image prepare ${name} does that\n`)
    return status.error
  }
  await print(context.stdout, options.json ? `${JSON.stringify(image, null, 2)}\n` : `${image.folder}\n`)
  return status.ok
}

/** `skep image remove`. */
export async function imageRemove(name: string, context: Context): Promise<number> {
  const removed = await removeImage(name, { signal: context.signal })
  if (!removed) context.stderr.write(`skep: image ${name} was not prepared; nothing is removed\n`)
  return status.ok
}

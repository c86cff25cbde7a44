// The default guest: Debian's cloud kernel and a small initramfs, made by the package itself and cached.
import { step } from './progress.mjs'

export const DEFAULT_GUEST = 'debian-cloud'

/**
 * Prepares the default guest (at once when it is cached).
 * @returns {Promise<{ name: string, kernel: string, initrd: string, cmdline: string, prompt: string }>}
 */
export async function prepareGuest(name = DEFAULT_GUEST) {
  const { prepareImage } = await import('../../dist/index.js')
  return await step(`prepare the guest ${name}`, async (step) => {
    return await prepareImage(name, { onProgress: ({ message }) => step.note(message) })
  })
}

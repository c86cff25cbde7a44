// An initramfs that says when its first program runs.
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { state } from '../../scripts/lib/paths.mjs'

/** The guest's first program prints it, before it becomes the initramfs's own init. */
export const INIT_MARKER = '<init>'

/** What names that program on the kernel's command line. */
export const INIT_OPTION = 'rdinit=/marked-init'

/**
 * The guest's initramfs with one more file, as a second archive behind the first (the kernel takes any number): a first
 * program that says that it runs and becomes the real one.
 */
export async function markedInitrd(guest) {
  const { writeInitramfs } = await import('../../dist/index.js')
  const more = join(state, 'bench-marker.cpio')
  const data = `#!/bin/sh\necho '${INIT_MARKER}'\nexec /init\n`
  await writeInitramfs(more, [{ path: 'marked-init', type: 'file', mode: 0o755, data }])
  const path = join(state, 'bench-initrd')
  writeFileSync(path, Buffer.concat([readFileSync(guest.initrd), readFileSync(more)]))
  return path
}

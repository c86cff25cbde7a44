// The kernel proper out of a bzImage: what its decompressor would have made of it, done by the host's programs.
import { spawn } from 'node:child_process'
import { readFileSync, writeFileSync } from 'node:fs'
import { Failure } from './run.mjs'

/** How the payload begins, what unpacks it, and whether its size follows it (Documentation/arch/x86/boot.rst, payload_offset). */
const FORMATS = [
  { magic: [0x1f, 0x8b], command: ['gzip', '-dc'], sized: false },
  { magic: [0xfd, 0x37, 0x7a, 0x58, 0x5a], command: ['xz', '-dc'], sized: true },
  { magic: [0x28, 0xb5, 0x2f, 0xfd], command: ['zstd', '-dc'], sized: true },
  { magic: [0x02, 0x21, 0x4c, 0x18], command: ['lz4', '-dc'], sized: true },
]

/** Writes the ELF kernel in the bzImage `from` to `to`. */
export async function extractKernel(from, to) {
  const image = readFileSync(from)
  if (image.toString('latin1', 0x202, 0x206) !== 'HdrS') throw new Failure(`${from} is no bzImage`)
  const start = ((image[0x1f1] || 4) + 1) * 512 + image.readUInt32LE(0x248)
  const payload = image.subarray(start, start + image.readUInt32LE(0x24c))
  const format = FORMATS.find(({ magic }) => magic.every((byte, at) => payload[at] === byte))
  if (!format) throw new Failure(`${from} is compressed in a way that is not known here`)
  writeFileSync(to, await filter(format.command, format.sized ? payload.subarray(0, -4) : payload))
}

function filter([command, ...args], input) {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, { stdio: ['pipe', 'pipe', 'inherit'] })
    const chunks = []
    child.once('error', () => reject(new Failure(`${command} is missing: sudo apt install ${command}`)))
    child.stdout.on('data', (chunk) => chunks.push(chunk))
    child.once('close', (status) =>
      status === 0 ? resolve(Buffer.concat(chunks)) : reject(new Failure(`${command} ended with status ${status}`)),
    )
    // It may end without having read all; its status tells.
    child.stdin.on('error', () => {})
    child.stdin.end(input)
  })
}

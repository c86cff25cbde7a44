// npm start: from a bare checkout to a shell prompt in a guest. With a terminal the prompt is yours; without one
// (in a pipe, in CI) the guest boots, says who it is, and is powered off.
import { join } from 'node:path'
import { build } from './lib/build.mjs'
import { prepareGuest } from './lib/guest.mjs'
import { root } from './lib/paths.mjs'
import { plain, step } from './lib/progress.mjs'
import { Failure, main, runAttached } from './lib/run.mjs'
import { checkTools } from './lib/tools.mjs'

const MACHINE = { cpus: 2, memory: '512M' }
const BOOT_TIMEOUT = 300_000
const COMMAND_TIMEOUT = 60_000

/** Hands the terminal to `skep run`; its exit status tells how the guest ended, and a power-off is what one wants. */
async function interactive(guest) {
  const args = ['run', '--kernel', guest.kernel, '--initrd', guest.initrd, '--cmdline', guest.cmdline]
  args.push('--memory', MACHINE.memory, '--cpus', `${MACHINE.cpus}`, '--serial', 'stdio')
  const status = await runAttached(process.execPath, [join(root, 'dist/cli/main.js'), ...args])
  const POWER_OFF = 1
  return status === POWER_OFF ? 0 : status
}

/** Boots, shows the console up to the prompt and one command's answer, powers off. */
async function unattended(guest) {
  const { Vm } = await import('../dist/index.js')
  const { kernel, initrd, cmdline, prompt } = guest
  const vm = await Vm.create({ ...MACHINE, boot: { kernel, initrd, cmdline } })
  try {
    const console = vm.console(1)
    await step('boot to the shell prompt', async (step) => {
      console.on('data', (chunk) => {
        const line = plain(chunk.toString()).trimEnd().split('\n').at(-1)
        step.note(line)
      })
      await vm.start()
      await console.waitFor(prompt, { timeout: BOOT_TIMEOUT })
    })
    console.write('uname -a\n')
    const [line] = await console.waitFor(/^Linux .*$/m, { timeout: COMMAND_TIMEOUT })
    process.stdout.write(`${prompt}uname -a\n${line}\n${prompt}poweroff -f\n`)
    await step('power off', async () => {
      await console.waitFor(prompt, { timeout: COMMAND_TIMEOUT })
      console.write('poweroff -f\n')
      const { reason, status, detail } = await vm.exited
      if (reason !== 'power-off')
        throw new Failure(`the guest ended by ${reason} (status ${status})${detail ? `: ${detail}` : ''}`)
    })
  } finally {
    await vm[Symbol.asyncDispose]()
  }
  return 0
}

await main(async () => {
  await checkTools({ guests: true })
  await build()
  const guest = await prepareGuest()
  return process.stdin.isTTY ? interactive(guest) : unattended(guest)
})

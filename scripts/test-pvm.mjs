// npm run test:pvm: Debian's kernel up to its first instruction in user mode, on this machine's own /dev/kvm, whatever that is. It
// is for the paravirtual kind (docs/kvm.md), which takes many minutes and is therefore no part of npm test.
//   npm run test:pvm -- [--minutes 90] [--accel kvm|software]
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { build } from './lib/build.mjs'
import { prepareGuest } from './lib/guest.mjs'
import { root, state } from './lib/paths.mjs'
import { plain, step } from './lib/progress.mjs'
import { Failure, main, run } from './lib/run.mjs'
import { checkTools } from './lib/tools.mjs'
import { extractKernel } from './lib/vmlinux.mjs'

const MARK = '<user mode>'
/**
 * Every instruction of the kernel is interpreted by the host's kernel. So it starts unpacked, and does without what is not needed for a first
 * program: 0.33 billion instructions instead of 1.33 (`--accel software` counts them). XSAVE is not
 * offered to guests there, and seen all the same.
 */
const CMDLINE = [
  ...['console=ttyS0', 'rdinit=/init', 'panic=-1', 'nokaslr', 'noxsave', 'no_timer_check', 'mitigations=off'],
  ...['lpj=5000000', 'audit=0', 'ipv6.disable=1', 'lsm=capability', 'init_on_alloc=0', 'init_on_free=0'],
  ...['cryptomgr.notests=1', 'dhash_entries=1024', 'ihash_entries=1024', 'mhash_entries=512', 'mphash_entries=512'],
  ...['thash_entries=512', 'uhash_entries=256'],
  'initcall_blacklist=jent_mod_init,load_system_certificate_list,init_ima,init_evm,tracer_init_tracefs,init_kprobes',
].join(' ')

await main(async () => {
  const { values } = parseArgs({
    options: { minutes: { type: 'string', default: '90' }, accel: { type: 'string', default: 'kvm' } },
  })
  const timeout = Number(values.minutes) * 60_000
  if (!(timeout > 0)) throw new Failure(`--minutes ${values.minutes}: a number is wanted`, 2)
  await checkTools({ guests: true, tests: true })
  await build()
  const guest = await prepareGuest()
  const { Vm, writeInitramfs } = await import('../dist/index.js')

  const folder = join(state, 'pvm')
  mkdirSync(folder, { recursive: true })
  const [kernel, initrd, object, init] = ['vmlinux', 'initrd', 'init.o', 'init'].map((name) => join(folder, name))
  await extractKernel(guest.kernel, kernel)
  await run('as', [join(root, 'scripts/lib/first-program.s'), '-o', object])
  await run('ld', ['-static', '-nostdlib', '-o', init, object])
  await writeInitramfs(initrd, [
    { path: 'init', type: 'file', mode: 0o755, source: init },
    { path: 'dev/console', type: 'char', major: 5, minor: 1 },
  ])

  const { accel } = values
  const boot = { kernel, initrd, cmdline: CMDLINE }
  const vm = await Vm.create({ memory: '96M', accel, boot, onReboot: 'exit' })
  try {
    const began = performance.now()
    await step(`Debian's kernel to user mode, accel ${accel}`, async (step) => {
      vm.console(1).on('data', (chunk) => step.note(plain(chunk.toString()).trimEnd().split('\n').at(-1)))
      await vm.start()
      await vm.console(1).waitFor(MARK, { timeout })
    })
    const [{ exits, emulated, instructions, kernel: counts }] = (await vm.stats()).vcpus
    const seconds = ((performance.now() - began) / 1000).toFixed(0)
    process.stdout.write(
      `user mode after ${seconds} s; ${JSON.stringify({ instructions, emulated, exits, kernel: counts }, null, 2)}\n`,
    )
  } finally {
    await vm[Symbol.asyncDispose]()
  }
  return 0
})

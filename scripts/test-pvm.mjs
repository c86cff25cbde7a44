// npm run test:pvm: Debian's kernel up to its first instruction in user mode, on this machine's own /dev/kvm, whatever that is. It
// is for the paravirtual kind (docs/kvm.md), which takes many minutes and is therefore no part of npm test.
//   npm run test:pvm -- [--minutes 90] [--accel kvm|software]
import { createWriteStream, mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { cpus } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { build } from './lib/build.mjs'
import { prepareGuest } from './lib/guest.mjs'
import { logs, root, state } from './lib/paths.mjs'
import { plain, step } from './lib/progress.mjs'
import { Failure, main, run } from './lib/run.mjs'
import { checkTools } from './lib/tools.mjs'
import { extractKernel } from './lib/vmlinux.mjs'

/** What the first program leaves in RAX, as the kernel shows it when that program has ended. */
const MARK = 'RAX: 00000000736b6570'
/**
 * Every instruction of the kernel is interpreted by the host's kernel. So it starts unpacked, and does without what is not needed for a first
 * program: 0.33 billion instructions instead of 1.33 (`--accel software` counts them). XSAVE is not
 * offered to guests there, and seen all the same. Without SSSE3 (137) it does without vector registers.
 */
const CMDLINE = [
  ...['console=ttyS0', 'rdinit=/init', 'panic=-1', 'nokaslr', 'noxsave', 'no_timer_check', 'mitigations=off'],
  ...['lpj=5000000', 'audit=0', 'ipv6.disable=1', 'lsm=capability', 'init_on_alloc=0', 'init_on_free=0'],
  ...['cryptomgr.notests=1', 'dhash_entries=1024', 'ihash_entries=1024', 'mhash_entries=512', 'mphash_entries=512'],
  ...['thash_entries=512', 'uhash_entries=256'],
  'highres=off nohz=off nolapic_timer nowatchdog rcupdate.rcu_cpu_stall_suppress=1 clearcpuid=137',
  'initcall_blacklist=jent_mod_init,load_system_certificate_list,init_ima,init_evm,tracer_init_tracefs,init_kprobes,' +
    'ftrace_check_for_weak_functions',
].join(' ')

/**
 * Every instruction takes some 3 us there, and a tick of the guest's 250 a second 850 to 2,600 instructions: it would do nothing else. So the
 * timer thread gets the leftovers of the processor that the vCPU runs on, and the ticks that it misses are lost. Root may do that.
 */
async function slowTicks() {
  const threads = readdirSync('/proc/self/task').map((id) => [
    readFileSync(`/proc/self/task/${id}/comm`, 'utf8').trim(),
    id,
  ])
  const { 'skep-vcpu0': vcpu, 'skep-timer': timer } = Object.fromEntries(threads)
  if (!vcpu || !timer) throw new Failure('the machine has no thread named skep-vcpu0 or skep-timer')
  const cpu = String(cpus().length - 1)
  for (const thread of [vcpu, timer]) await run('taskset', ['-p', '-c', cpu, thread], { log: 'pvm' })
  await run('chrt', ['--idle', '-p', '0', timer], { log: 'pvm' })
  await run('renice', ['-n', '-20', '-p', vcpu], { log: 'pvm' })
}

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
      const log = createWriteStream(join(logs, 'pvm-console.log'))
      vm.console(1).on('data', (chunk) => {
        log.write(chunk)
        step.note(plain(chunk.toString()).trimEnd().split('\n').at(-1))
      })
      await vm.start()
      await slowTicks()
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

// L1: a host with hardware virtualization where there is none. QEMU emulates an AMD processor with SVM and nested paging, in
// it runs Debian's kernel with its own kvm_amd, and in that any command of this machine, with this machine's files.
import {
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readSync,
  realpathSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { cpuTime } from '../cpu-time.mjs'
import { root } from '../paths.mjs'
import { duration } from '../progress.mjs'
import { Failure, output, run } from '../run.mjs'
import { prepareL1 } from './image.mjs'

export const QEMU = 'qemu-system-x86_64'
/**
 * What a command gets where nothing else is said; `timeout` in ms. One processor: with two, each a thread of QEMU's, guests
 * have been seen with registers of the host, and the host's kernel has died (QEMU 7.2).
 */
export const DEFAULTS = { cpus: 1, memory: '2G', timeout: 600_000 }
/** Exit status where the time was up, as timeout(1) has it. */
const TIMED_OUT = 124
/** Exit status where L1 itself failed. */
const BROKEN = 125

/**
 * How often L1 is sent something, in ms. QEMU 7.2's VMRUN and #VMEXIT change the set of pending interrupts without its lock, and can lose one
 * that comes in that moment. If it was the timer's, which is set for one interrupt at a time, there is no other: L1 stays in its guest for
 * good. Any other interrupt brings the lost one back.
 */
const PULSE = 1_000
/** What it then says on its console while it runs a command. */
const ALIVE = 'l1: alive'
/**
 * It has stood still if it did not say so for so long, in ms of its own processor time or, should it use none, of time. A busy
 * machine gives it little.
 */
const SILENCE = { cpu: 150_000, wall: 900_000 }
const LOOK = 10_000
const POLL = 25
const CONSOLE_TAIL = 30
/** These have the same meaning in L1, whose files are the same. */
const INHERITED = ['PATH', 'HOME', 'XDG_CACHE_HOME', 'NO_COLOR', 'CI']

/**
 * The kernel of L1 trusts what QEMU's emulation gets right, and does without what costs time under it: the TSC is the
 * host's, and mitigations protect nothing here.
 */
const CMDLINE = 'console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check random.trust_cpu=on'

/**
 * The frequency of this machine's TSC, which is L1's too. On a busy machine L1 cannot measure it: its clock has been seen to run
 * twenty times too fast. The kernel here tells it where the processor does not count its own cycles, as in virtual machines.
 */
function knownTsc() {
  const text = readFileSync('/proc/cpuinfo', 'utf8')
  const flags = text.match(/^flags\s*: (.*)$/m)?.[1]?.split(' ') ?? []
  const mhz = Number(text.match(/^cpu MHz\s*: ([\d.]+)$/m)?.[1])
  if (!(mhz > 0) || !flags.includes('constant_tsc') || flags.includes('aperfmperf')) return ''
  return ` tsc_early_khz=${Math.round(mhz * 1000)}`
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`

/** Throws a message that says how to get QEMU, if it is not there. */
export async function checkL1() {
  if (!(await output(QEMU, ['--version'])))
    throw new Failure(`${QEMU} is missing, which emulates the machine for KVM: sudo apt install qemu-system-x86`)
}

/**
 * Runs a command in a fresh L1, as root. All files of this machine are there under their own paths; what the command
 * writes is gone afterwards, except in the folders of `writable`. There is no network and nothing on stdin.
 * @param {string[]} command
 * @param {object} [options]
 * @param {number} [options.cpus]
 * @param {string} [options.memory] for the kernel, the command and what it writes; with a suffix K, M or G
 * @param {number} [options.timeout] for all of it, in ms
 * @param {string} [options.cwd]
 * @param {NodeJS.ProcessEnv} [options.env] additions to the environment
 * @param {string[]} [options.writable] folders of this machine that the command may write
 * @param {(chunk: Buffer) => void} [options.onStdout]
 * @param {(chunk: Buffer) => void} [options.onStderr]
 * @param {(pid: number) => void} [options.onSpawn] is told the process that emulates L1
 * @param {string} [options.log] name of the log file for L1's console
 * @returns {Promise<number>} exit status of the command
 */
export async function runInL1(command, options = {}) {
  const { cpus, memory, timeout, cwd, env, writable, onStdout, onStderr, onSpawn, log } = {
    ...DEFAULTS,
    cwd: root,
    env: {},
    writable: [],
    log: 'l1',
    ...options,
  }
  await checkL1()
  const { kernel, initrd } = await prepareL1()
  // The real path: in L1 the links of this machine lead nowhere while its root is not mounted in its place.
  const job = mkdtempSync(join(realpathSync(tmpdir()), 'skep-l1-'))
  const clean = () => rmSync(job, { recursive: true, force: true })
  process.once('exit', clean)
  let stopPulse = () => {}
  try {
    const shares = writable.map((path, index) => [`share${index}`, path])
    for (const [, path] of shares) mkdirSync(path, { recursive: true })
    writeFileSync(join(job, 'shares'), shares.map(([tag, path]) => `${tag} ${realpathSync(path)}\n`).join(''))
    writeFileSync(join(job, 'command'), script(command, cwd, env), { mode: 0o600 })
    const file = (name) => join(job, name)
    const port = (name) => [
      ...['-chardev', `file,id=${name},path=${file(name)}`],
      ...['-device', `virtserialport,chardev=${name},name=${name}`],
    ]
    const folder = (tag, path, more) => [
      ...['-fsdev', `local,id=${tag},path=${path},security_model=none${more}`],
      ...['-device', `virtio-9p-pci,fsdev=${tag},mount_tag=${tag}`],
    ]
    const args = [
      ...['-machine', 'q35,hpet=off', '-accel', 'tcg,thread=multi,tb-size=512', '-cpu', 'EPYC,+svm,+npt'],
      ...['-smp', `${cpus}`, '-m', memory, '-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot'],
      ...['-kernel', kernel, '-initrd', initrd, '-append', `${CMDLINE}${knownTsc()} l1.job=${job}`, '-serial', 'stdio'],
      ...folder('root', '/', ',readonly=on,multidevs=remap'),
      ...shares.flatMap(([tag, path]) => folder(tag, path, '')),
      ...['-device', 'virtio-rng-pci', '-device', 'virtio-serial-pci'],
      ...['stdout', 'stderr', 'status'].flatMap(port),
      ...['-chardev', `socket,id=pulse,path=${file('pulse')}`],
      ...['-device', 'virtserialport,chardev=pulse,name=pulse'],
    ]
    stopPulse = await pulse(file('pulse'))
    const streams = [follow(file('stdout'), onStdout), follow(file('stderr'), onStderr)]
    const { tail, ended } = await boot(args, timeout, log, onSpawn)
    for (const stop of streams) stop()
    const status = readStatus(file('status'))
    if (status !== undefined) return status
    const reason = ended ?? 'it died'
    const text = `L1 did not finish: ${reason}; its console ends with\n${tail.join('\n')}`
    throw new Failure(text, ended === undefined ? BROKEN : TIMED_OUT)
  } finally {
    stopPulse()
    process.off('exit', clean)
    clean()
  }
}

/** The script that L1 runs. */
function script(command, cwd, env) {
  const inherited = Object.fromEntries(INHERITED.map((name) => [name, process.env[name]]))
  const variables = Object.entries({ TERM: 'dumb', LANG: 'C.UTF-8', ...inherited, ...env, SKEP_L1: '1' })
  const exports = variables
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => `${name}=${quoted(value)}`)
  const alive = [
    'for port in /sys/class/virtio-ports/*; do',
    `  if [ "$(cat "$port/name")" = pulse ]; then pulse=/dev/\${port##*/}; fi`,
    'done',
    `(while read -r _; do echo '${ALIVE}'; done) <"$pulse" >/dev/console 2>&1 &`,
  ].join('\n')
  return `${alive}\ncd ${quoted(cwd)} || exit 125\nexec env -i ${exports.join(' ')} ${command.map(quoted).join(' ')}\n`
}

/** Runs QEMU to its end; the end of L1's console and, if it had to be ended, why. */
async function boot(args, timeout, log, onSpawn) {
  const tail = []
  const end = new AbortController()
  let emulator
  let last = { cpu: 0, wall: Date.now() }
  const now = () => {
    try {
      return { cpu: cpuTime(emulator), wall: Date.now() }
    } catch {
      // It has just ended.
      return last
    }
  }
  const onLine = (line) => {
    if (line.includes(ALIVE)) {
      last = now()
      return
    }
    if (line.includes("TCG doesn't support requested feature")) return
    tail.push(line)
    if (tail.length > CONSOLE_TAIL) tail.shift()
  }
  const look = () => {
    const { cpu, wall } = now()
    if (cpu - last.cpu < SILENCE.cpu && wall - last.wall < SILENCE.wall) return
    end.abort(`it stood still for ${duration(wall - last.wall)}, ${duration(cpu - last.cpu)} of processor time`)
  }
  const limit = setTimeout(() => end.abort(`the time was up after ${duration(timeout)}`), timeout)
  let looks
  try {
    // If we are killed, QEMU is too.
    const command = ['--pdeathsig', 'KILL', '--', QEMU, ...args]
    const started = (pid) => {
      emulator = pid
      looks = setInterval(look, LOOK)
      onSpawn?.(pid)
    }
    await run('setpriv', command, { log, allowFailure: true, signal: end.signal, onLine, onSpawn: started })
    return { tail }
  } catch (error) {
    if (!end.signal.aborted) throw error
    return { tail, ended: end.signal.reason }
  } finally {
    clearTimeout(limit)
    clearInterval(looks)
  }
}

/** Sends L1 an empty line now and then, through a socket that QEMU connects to; the returned function ends it. */
async function pulse(path) {
  const server = createServer((socket) => {
    const timer = setInterval(() => socket.write('\n'), PULSE)
    socket.on('error', () => {})
    socket.on('close', () => clearInterval(timer))
  })
  await new Promise((resolve, reject) => server.once('error', reject).listen(path, resolve))
  return () => server.close()
}

/** Hands on what is appended to a file; the returned function reads the rest and ends it. */
function follow(path, onData) {
  if (!onData) return () => {}
  writeFileSync(path, '')
  const fd = openSync(path, 'r')
  const buffer = Buffer.alloc(64 << 10)
  const drain = () => {
    for (let length = readSync(fd, buffer); length > 0; length = readSync(fd, buffer))
      onData(buffer.subarray(0, length))
  }
  const timer = setInterval(drain, POLL)
  return () => {
    clearInterval(timer)
    drain()
    closeSync(fd)
  }
}

function readStatus(path) {
  try {
    const text = readFileSync(path, 'utf8').trim()
    return /^\d+$/.test(text) ? Number(text) : undefined
  } catch {
    return undefined
  }
}

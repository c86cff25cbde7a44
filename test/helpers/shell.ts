/**
 * A guest whose shell is on the serial console: boot it, run commands in it, read what they say.
 *
 * @module
 */
import { type Console, Vm, type VmConfig } from '../../dist/index.js'
import { accel, patience, soundCpu } from './accel.js'
import { debianCloud, type Guest } from './guests.js'

/** Long enough for the slowest machine that runs the tests; nothing waits that long when all is well. */
export const BOOT_TIMEOUT = 240_000 * patience
const COMMAND_TIMEOUT = 90_000 * patience

/** What a command in the guest said. */
export interface CommandResult {
  /** Standard output and error, lines ended by `\n`. */
  output: string
  /** Exit status. */
  status: number
}

/** A booted guest. */
export class Shell implements AsyncDisposable {
  readonly console: Console
  #commands = 0

  private constructor(
    readonly vm: Vm,
    readonly guest: Guest,
  ) {
    this.console = vm.console(1)
  }

  /** Creates and starts a machine with `guest` in it, and waits for the prompt. */
  static async boot(config: Partial<VmConfig> = {}, { cmdline = '', guest }: { cmdline?: string; guest?: Guest } = {}) {
    const image = guest ?? (await debianCloud())
    const boot = { kernel: image.kernel, initrd: image.initrd, cmdline: `${image.cmdline} ${cmdline}`.trim() }
    const vm = await Vm.create({ memory: '512M', accel, ...soundCpu, ...config, boot })
    const shell = new Shell(vm, image)
    try {
      await vm.start()
      await shell.prompt(BOOT_TIMEOUT)
      // What the kernel says now and then must not come between what commands say; its log has it.
      await shell.read('dmesg -n 1')
    } catch (error) {
      await vm[Symbol.asyncDispose]()
      throw error
    }
    return shell
  }

  /** Waits for the next prompt. */
  async prompt(timeout = COMMAND_TIMEOUT): Promise<void> {
    await this.console.waitFor(this.guest.prompt, { timeout })
  }

  /** Types a command and returns at once; for those that end the guest. */
  type(command: string): void {
    this.console.write(`${command}\n`)
  }

  /** Runs a command to its end, up to and with the next prompt. */
  async run(command: string, timeout = COMMAND_TIMEOUT): Promise<CommandResult> {
    const n = ++this.#commands
    // What is typed is echoed: the quotes keep the echo from looking like the answer.
    this.type(`echo '<'begin ${n}'>'; ${command}; echo '<'end ${n} $?'>'`)
    const answer = new RegExp(`<begin ${n}>\\r?\\n([\\s\\S]*?)<end ${n} (\\d+)>`)
    const [, output = '', status] = await this.console.waitFor(answer, { timeout })
    await this.prompt()
    return { output: output.replaceAll('\r\n', '\n'), status: Number(status) }
  }

  /** Runs a command that must succeed; its output without the white space around it. */
  async read(command: string, timeout?: number): Promise<string> {
    const { output, status } = await this.run(command, timeout)
    if (status !== 0) throw new Error(`${command} ended with status ${status}: ${output}`)
    return output.trim()
  }

  /** Lines of the kernel's log that no healthy boot has. */
  async complaints(): Promise<string[]> {
    const bad =
      'BUG:|Oops|WARNING:|Call Trace|rcu.*stall|soft lockup|hung task|unchecked MSR|clocksource.*unstable|I/O error|invalid opcode|general protection'
    const { output } = await this.run(`dmesg | grep -E '${bad}'`)
    return output.split('\n').filter(Boolean)
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.vm[Symbol.asyncDispose]()
  }
}

/** A console on the terminal, or in a pipe. */
import type { Console } from '../console.js'
import type { Vm } from '../vm.js'
import { type Context, colors, printError } from './context.js'
import { EscapeFilter, escapeHelp } from './escape.js'

const newline = 0x0a

/**
 * Attaches a console to standard input and output: on a terminal raw, with the escape key; from a pipe as bytes. Disposing
 * gives the terminal back as it was.
 */
export function attach(vm: Vm, console: Console, context: Context): Disposable {
  console.pipe(context.stdout, { end: false })
  const input = context.stdin.isTTY ? attachTerminal(vm, console, context) : attachPipe(console, context)
  return {
    [Symbol.dispose]() {
      input[Symbol.dispose]()
      console.unpipe(context.stdout)
      // What follows, ours or the shell's prompt, begins on a line of its own.
      const [last] = console.tail(1)
      if (context.stdout.isTTY && last !== undefined && last !== newline) context.stdout.write('\n')
    },
  }
}

/** Feeds standard input to a console, and shows nothing: for `--json`. */
export function attachInput(console: Console, context: Context): Disposable {
  return context.stdin.isTTY ? { [Symbol.dispose]() {} } : attachPipe(console, context)
}

function attachPipe(console: Console, { stdin }: Context): Disposable {
  // The end of the input is not the end of the guest, and what cannot be read does not harm it.
  const onError = (): void => {}
  stdin.on('error', onError)
  stdin.pipe(console, { end: false })
  return {
    [Symbol.dispose]() {
      stdin.unpipe(console)
      stdin.pause()
      stdin.destroy()
    },
  }
}

function attachTerminal(vm: Vm, console: Console, context: Context): Disposable {
  const { stdin, stderr } = context
  const color = colors(stderr)
  const filter = new EscapeFilter()
  const say = (text: string): void => void stderr.write(`\r\n${color.cyan(text)}\r\n`)
  const restore = (): void => {
    stdin.setRawMode(false)
  }
  const report = (error: unknown): void => printError(error, context)
  const onData = (typed: Buffer): void => {
    for (const part of filter.feed(typed)) {
      if ('data' in part) {
        if (!console.write(part.data)) {
          stdin.pause()
          console.once('drain', () => stdin.resume())
        }
      } else if (part.action === 'quit') {
        vm.kill().catch(report)
      } else if (part.action === 'power-button') {
        vm.powerButton().catch(report)
      } else if (part.action === 'reset') {
        vm.reset().catch(report)
      } else {
        say(escapeHelp.join('\r\n'))
      }
    }
  }
  // A shell that was left in between takes the terminal back to its own mode.
  const onContinue = (): void => {
    stdin.setRawMode(true)
  }
  stderr.write(color.dim("The terminal is the guest's now; ^] . ends it, ^] ? helps.\n"))
  process.on('exit', restore)
  process.on('SIGCONT', onContinue)
  stdin.setRawMode(true)
  stdin.on('data', onData)
  stdin.resume()
  return {
    [Symbol.dispose]() {
      stdin.off('data', onData)
      stdin.pause()
      restore()
      process.off('exit', restore)
      process.off('SIGCONT', onContinue)
    },
  }
}

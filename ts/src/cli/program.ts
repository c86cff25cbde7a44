/** The tree of commands. */
import { readFileSync } from 'node:fs'
import { Argument, Command, type CommanderError, Option } from 'commander'
import { nearest } from '../config/suggest.js'
import { defaultImage } from '../images/index.js'
import { type Completer, completionScript, type Shell, shells } from './commands/completion.js'
import { doctor } from './commands/doctor.js'
import { imageList, imagePath, imagePrepare, imageRemove } from './commands/image.js'
import { run } from './commands/run.js'
import { type Context, colors, print, status, UsageError } from './context.js'
import { longName, type RunOption, runOptions } from './options.js'

/** What is completed how. */
const completer: Completer = (command, item) => {
  if (command === 'run') {
    const option = runOptions.find((one) => longName(one) === item)
    return option ? (option.complete ?? 'none') : item === 'machine' ? 'file' : 'none'
  }
  if (command.startsWith('image ') && item === 'name') return 'image'
  return command === 'completion' && item === 'shell' ? 'shell' : 'none'
}

/** Makes the tree; `finish` is given the exit status of the command that ran. */
export function createProgram(context: Context, finish: (status: number) => void): Command {
  const program = new Command('skep')
  const color = colors(context.stdout)
  program
    .description('A bhyve-class hypervisor: run a machine, look at the host, prepare guests.')
    .version(version(), '-V, --version', 'print the version')
    .helpOption('-h, --help', 'print help')
    .helpCommand('help [command]', 'print help for a command')
    .configureHelp({
      styleTitle: (text) => color.bold(text),
      helpWidth: context.stdout.columns ?? 100,
    })
    .configureOutput({
      writeOut: (text) => void context.stdout.write(text),
      writeErr: (text) => void context.stderr.write(text),
      // Errors are told in one place, and by our own words.
      outputError: () => {},
    })
    .showSuggestionAfterError(false)
    .exitOverride()
  addRun(program, context, finish)
  addDoctor(program, context, finish)
  addImage(program, context, finish)
  addCompletion(program, context, finish)
  program.action((_, __, command: Command) => {
    throw unknownCommand(command, command.args[0])
  })
  program.argument('[command]')
  program.usage('[options] <command>')
  return program
}

function addRun(program: Command, context: Context, finish: (status: number) => void): void {
  const given: { option: RunOption; value: string }[] = []
  const command = program
    .command('run')
    .description('create a machine and run it on this terminal')
    .argument('[machine]', 'configuration (a JSON file), or a name for the machine')
    .addHelpText(
      'after',
      `
Exit status: how the guest ended, as of bhyve(8): 0 reboot, 1 power-off, 2 halt, 3 triple fault, 4 error; 128+n on a
signal. On a terminal ^] . ends the machine and ^] ? helps; from a pipe, standard input is typed into the guest.

Examples:
  $ skep run --image debian-cloud -c 2 -m 512M
  $ skep run --kernel vmlinuz --initrd initrd --cmdline console=ttyS0 --memory 512M
  $ skep run web1.json --serial file:web1.log --timeout 10m
  $ skep run --json web1.json | jq .type`,
    )
    .action(async (operand: string | undefined) => {
      finish(await run({ given, operand }, context))
    })
  for (const option of runOptions) {
    const item = new Option(option.flags, option.about).helpGroup(option.group)
    // commander keeps the last value; all of them are wanted, in order.
    item.argParser((value: string) => {
      if (option.choices && !option.choices.includes(value)) throw wrongChoice(option, value)
      given.push({ option, value })
      return value
    })
    if (option.choices) item.argChoices = [...option.choices]
    command.addOption(item)
    if (!/[<[]/.test(option.flags)) command.on(`option:${item.name()}`, () => given.push({ option, value: '' }))
  }
}

function addDoctor(program: Command, context: Context, finish: (status: number) => void): void {
  program
    .command('doctor')
    .description('say what this host offers, and which accelerator is used and why')
    .option('--json', 'print it as JSON')
    .action(async (options: { json?: boolean }) => finish(await doctor(options, context)))
}

function addImage(program: Command, context: Context, finish: (status: number) => void): void {
  const image = program.command('image').description('prepare guests: a kernel and an initramfs by name')
  const name = (): Argument => new Argument('[name]', 'name of the image').default(defaultImage)
  image
    .command('list')
    .description('list the images there are, and which are prepared')
    .option('--json', 'print them as JSON')
    .action(async (options: { json?: boolean }) => finish(await imageList(options, context)))
  image
    .command('prepare')
    .description('prepare an image, and print its folder')
    .addArgument(name())
    .option('--refresh', "make it anew, of today's packages")
    .option('--json', 'print it as JSON')
    .action(async (name: string, options: { refresh?: boolean; json?: boolean }) =>
      finish(await imagePrepare(name, options, context)),
    )
  image
    .command('path')
    .description('print the folder of a prepared image')
    .addArgument(name())
    .option('--json', 'print it as JSON')
    .action(async (name: string, options: { json?: boolean }) => finish(await imagePath(name, options, context)))
  image
    .command('remove')
    .description('remove a prepared image')
    .addArgument(new Argument('<name>', 'name of the image'))
    .action(async (name: string) => finish(await imageRemove(name, context)))
  image.argument('[command]').usage('<command>')
  image.action((_, __, command: Command) => {
    throw unknownCommand(command, command.args[0])
  })
}

function addCompletion(program: Command, context: Context, finish: (status: number) => void): void {
  program
    .command('completion')
    .description('print the completions of a shell')
    .addArgument(new Argument('<shell>', 'bash, zsh or fish').choices(shells))
    .addHelpText('after', '\nExample:\n  $ source <(skep completion bash)')
    .action(async (shell: Shell) => {
      await print(context.stdout, completionScript(shell, program, completer, [defaultImage]))
      finish(status.ok)
    })
}

/** A mistake that commander found, in our words; nothing if it only printed help. */
export function usageError(error: CommanderError, program: Command, argv: readonly string[]): UsageError | undefined {
  const quoted = /'([^']*)'/.exec(error.message)?.[1] ?? ''
  const command = commandOf(program, argv)
  switch (error.code) {
    case 'commander.helpDisplayed':
    case 'commander.help':
    case 'commander.version':
      return undefined
    case 'commander.unknownOption': {
      const flag = quoted.split('=')[0] ?? quoted
      const known = optionNames(command)
      const near = nearest(
        flag.replace(/^-+/, ''),
        known.map((name) => name.slice(2)),
      )
      return new UsageError(`unknown option ${flag}${near === undefined ? '' : ` (did you mean --${near}?)`}`)
    }
    case 'commander.optionMissingArgument':
      return new UsageError(`option ${/--[\w-]+/.exec(quoted)?.[0] ?? quoted} wants a value`)
    case 'commander.invalidArgument': {
      const [, value = '', name = '', choices = ''] =
        /value '(.*)' is invalid for argument '(.*)'\. Allowed choices are (.*)\.$/.exec(error.message) ?? []
      const near = nearest(value, choices.split(', '))
      const hint = near === undefined ? '' : ` (did you mean ${near}?)`
      return new UsageError(`${name}: expected ${choices}, got ${JSON.stringify(value)}${hint}`)
    }
    case 'commander.missingArgument':
      return new UsageError(`${command.name()}: ${quoted} is missing; see skep help ${commandPath(command)}`)
    case 'commander.excessArguments':
      return new UsageError(`${commandPath(command)}: too many operands; see skep help ${commandPath(command)}`)
    default:
      return new UsageError(error.message.replace(/^error: /, ''))
  }
}

function unknownCommand(parent: Command, name: string | undefined): UsageError {
  const known = parent.commands.map((command) => command.name())
  const path = commandPath(parent)
  const prefix = path === '' ? 'skep' : `skep ${path}`
  if (name === undefined) return new UsageError(`which command? ${known.join(', ')}; see ${prefix} --help`)
  const near = nearest(name, known)
  return new UsageError(
    `unknown command ${name}${near === undefined ? `; see ${prefix} --help` : ` (did you mean ${near}?)`}`,
  )
}

function wrongChoice(option: RunOption, value: string): UsageError {
  const choices = option.choices ?? []
  const near = nearest(value, choices)
  const hint = near === undefined ? '' : ` (did you mean ${near}?)`
  return new UsageError(`${longName(option)}: expected ${choices.join(', ')}, got ${JSON.stringify(value)}${hint}`)
}

function commandOf(program: Command, argv: readonly string[]): Command {
  let command = program
  for (const word of argv) {
    const child = command.commands.find((one) => one.name() === word)
    if (child) command = child
  }
  return command
}

function commandPath(command: Command): string {
  return command.parent ? `${commandPath(command.parent)} ${command.name()}`.trim() : ''
}

function optionNames(command: Command): string[] {
  return command
    .createHelp()
    .visibleOptions(command)
    .flatMap((option) => (option.long ? [option.long] : []))
}

/** The version of this package. */
export function version(): string {
  const file = new URL('../../package.json', import.meta.url)
  return (JSON.parse(readFileSync(file, 'utf8')) as { version: string }).version
}

/** `skep run`: a machine at the terminal. */
import { existsSync, statSync } from 'node:fs'
import { dirname } from 'node:path'
import { StringDecoder } from 'node:string_decoder'
import { readConfig } from '../../config/load.js'
import { resolve } from '../../config/resolve.js'
import type { MachineSpec, VmConfig } from '../../config/types.js'
import type { Console } from '../../console.js'
import { ConfigError, HostError, isSkepError, type SkepError } from '../../errors.js'
import type { VmExit } from '../../events.js'
import { prepareImage } from '../../images/index.js'
import { comPorts } from '../../pci/layout.js'
import { lpcSlot } from '../../pci/slot.js'
import { Vm } from '../../vm.js'
import { type Context, colors, print, status, UsageError } from '../context.js'
import { type Draft, longName, type RunOption, type RunSettings } from '../options.js'
import { Progress } from '../progress.js'
import { attach, attachInput } from '../terminal.js'

/** What was given on the command line: options in order, and the operand. */
export interface RunArguments {
  given: readonly { option: RunOption; value: string }[]
  operand: string | undefined
}

/** Runs the command; the exit status. */
export async function run(args: RunArguments, context: Context): Promise<number> {
  const { spec, terminal, settings } = await assemble(args, context)
  if (settings.printConfig) {
    await print(context.stdout, `${JSON.stringify(spec, null, 2)}\n`)
    return status.ok
  }
  await using vm = await optionErrors(args, () => Vm.create(spec, { signal: context.signal }))
  const broken = onSerialError(vm)
  const timer = settings.timeout === undefined ? undefined : deadline(vm, settings.timeout, context)
  try {
    const exit = settings.json ? await runJson(vm, terminal, context) : await runAttached(vm, terminal, context)
    // Whoever asked the process to end gets that as its status, not what it did to the guest.
    context.signal.throwIfAborted()
    broken.throwIfAborted()
    tell(exit, settings, context)
    return exit.status
  } finally {
    clearTimeout(timer)
  }
}

async function assemble(
  args: RunArguments,
  context: Context,
): Promise<{ spec: MachineSpec; terminal: number | undefined; settings: RunSettings }> {
  const settings: RunSettings = {
    json: false,
    printConfig: false,
    timeout: undefined,
    image: undefined,
    config: undefined,
  }
  const fromOptions: Draft = {}
  // First what the options do on their own: --config may come last.
  optionErrorsSync(args, (option, value) => option.apply(value, fromOptions, settings))
  const operandIsFile = args.operand !== undefined && isConfigFile(args.operand)
  if (operandIsFile && settings.config !== undefined) {
    throw new UsageError(`there are two configurations, --config ${settings.config} and ${args.operand}`)
  }
  const configFile = operandIsFile ? args.operand : settings.config
  const draft: Draft = {}
  let base = process.cwd()
  if (configFile !== undefined) {
    const content = await readConfig(configFile)
    if (typeof content !== 'object' || content === null || Array.isArray(content)) {
      throw new ConfigError('ERR_CONFIG_FILE', `${configFile}: expected a JSON object`, {
        details: { file: configFile },
      })
    }
    Object.assign(draft, structuredClone(content))
    base = dirname(configFile)
  }
  if (!operandIsFile && args.operand !== undefined) draft['name'] = args.operand
  if (settings.image !== undefined) await bootImage(settings.image, draft, context)
  for (const { option, value } of args.given) option.apply(value, draft, settings)
  if (draft['boot'] === undefined) {
    throw new UsageError(
      'nothing to boot; give --kernel FILE, --rom FILE or a configuration, or --image debian-cloud for a guest ready made',
    )
  }
  draft['onReboot'] ??= 'exit'
  const spec = await optionErrors(args, async () => resolve(draft as unknown as VmConfig, { base }))
  return { spec, terminal: terminalPort(draft, spec), settings }
}

async function bootImage(name: string, draft: Draft, context: Context): Promise<void> {
  const progress = new Progress(context.stderr)
  try {
    const { kernel, initrd, cmdline } = await prepareImage(name, {
      signal: context.signal,
      onProgress: ({ message }) => progress.show(`preparing ${name}: ${message}`),
    })
    draft['boot'] = { kernel, initrd, cmdline }
  } finally {
    progress.clear()
  }
}

/** A JSON file is a configuration; any other word is a name. */
function isConfigFile(operand: string): boolean {
  if (operand.endsWith('.json') || operand.includes('/')) return true
  return existsSync(operand) && statSync(operand).isFile()
}

/** The port that the terminal is attached to: the one that asks for it, or the first console. */
function terminalPort(draft: Draft, spec: MachineSpec): number | undefined {
  const lpc = (draft as unknown as VmConfig).devices?.[lpcSlot]
  const asked = comPorts.findIndex((name) => lpc?.[name] === 'stdio')
  const first = comPorts.findIndex((name) => spec.devices[lpcSlot][name].kind === 'console')
  const index = asked >= 0 ? asked : first
  return index < 0 ? undefined : index + 1
}

async function runAttached(vm: Vm, terminal: number | undefined, context: Context): Promise<VmExit> {
  if (terminal === undefined) {
    await vm.start({ signal: context.signal })
    return await vm.exited
  }
  const console = vm.console(terminal as 1 | 2 | 3 | 4)
  const shown = new Promise<void>((done) => console.once('end', done).once('close', done))
  using _attached = attach(vm, console, context)
  await vm.start({ signal: context.signal })
  const exit = await vm.exited
  // Nothing more is shown to somebody who has gone, and it must not be waited for.
  if (!context.signal.aborted) await shown
  return exit
}

async function runJson(vm: Vm, terminal: number | undefined, context: Context): Promise<VmExit> {
  const line = (value: unknown): Promise<void> => print(context.stdout, `${JSON.stringify(value)}\n`)
  const consoles = comPorts.flatMap((name, index) =>
    vm.spec.devices[lpcSlot][name].kind === 'console' ? [vm.console((index + 1) as 1 | 2 | 3 | 4)] : [],
  )
  const input = terminal === undefined ? undefined : vm.console(terminal as 1 | 2 | 3 | 4)
  using _attached = input ? attachInput(input, context) : undefined
  const output = Promise.all(consoles.map((console) => printConsole(console, line)))
  const events = printEvents(vm, line, output)
  await vm.start({ signal: context.signal })
  await events
  return await vm.exited
}

async function printConsole(console: Console, line: (value: unknown) => Promise<void>): Promise<void> {
  const decoder = new StringDecoder('utf8')
  for await (const chunk of console as AsyncIterable<Buffer>) {
    const data = decoder.write(chunk)
    if (data !== '') await line({ type: 'console', port: console.port, data })
  }
  const data = decoder.end()
  if (data !== '') await line({ type: 'console', port: console.port, data })
}

async function printEvents(vm: Vm, line: (value: unknown) => Promise<void>, output: Promise<unknown>): Promise<void> {
  for await (const event of vm.events()) {
    // The exit is the last line, after all output.
    if (event.type === 'exit') await output
    await line(event)
  }
}

/** A log that cannot be written any more ends the machine: whoever asked for it would miss the rest in silence. */
function onSerialError(vm: Vm): AbortSignal {
  const controller = new AbortController()
  vm.once('serial-error', ({ port, message }) => {
    const path = `devices["${lpcSlot}"].com${port}`
    const text = `serial port ${port} cannot be written any more: ${message}; make room, or choose another file`
    controller.abort(new HostError('ERR_SERIAL_FILE', text, { path, details: { port } }))
    vm.kill().catch(() => {})
  })
  return controller.signal
}

function deadline(vm: Vm, timeout: number, context: Context): NodeJS.Timeout {
  return setTimeout(() => {
    context.stderr.write(`skep: time is up after ${timeout / 1000} s\n`)
    vm.kill().catch(() => {})
  }, timeout)
}

/** How it ended, for a person: always if it went wrong, otherwise where a terminal shows it. */
function tell(exit: VmExit, settings: RunSettings, { stderr }: Context): void {
  const wrong = exit.reason === 'error' || exit.reason === 'triple-fault'
  if (!wrong && (settings.json || !stderr.isTTY)) return
  const color = colors(stderr)
  const where = exit.vcpu === undefined ? '' : ` on vCPU ${exit.vcpu}`
  const detail = exit.detail === undefined ? '' : `: ${exit.detail}`
  const text = `the machine ended by ${exit.reason}${where}${detail} (status ${exit.status})`
  stderr.write(`${wrong ? color.red('skep:') : color.dim('skep:')} ${wrong ? text : color.dim(text)}\n`)
}

/** Errors about a part of the configuration that an option has set are told by the option's name. */
async function optionErrors<T>(args: RunArguments, action: () => Promise<T>): Promise<T> {
  try {
    return await action()
  } catch (error) {
    if (!isSkepError(error) || error.path === undefined) throw error
    const { path } = error
    const given = args.given.reduce<RunOption | undefined>((best, { option }) => {
      return covers(option.path, path) && (option.path?.length ?? 0) > (best?.path?.length ?? 0) ? option : best
    }, undefined)
    throw given ? renamed(error, path, longName(given)) : error
  }
}

/** Whether `path` is `option` or lies within it: `cpus` covers `cpus.pin.0`, and `cpu` does not. */
function covers(option: string | undefined, path: string): boolean {
  return option !== undefined && path.startsWith(option) && /^([.[]|$)/.test(path.slice(option.length))
}

function optionErrorsSync(args: RunArguments, action: (option: RunOption, value: string) => void): void {
  for (const { option, value } of args.given) {
    try {
      action(option, value)
    } catch (error) {
      if (!(error instanceof ConfigError)) throw error
      const name = longName(option)
      const message = error.message.replace(/^(cpus|serial port|boot\.\w+): /, '')
      throw new ConfigError(error.code, `${name}: ${message}`, { details: error.details, cause: error })
    }
  }
}

function renamed(error: SkepError, path: string, name: string): SkepError {
  const message = error.message.startsWith(`${path}: `) ? error.message.slice(path.length + 2) : error.message
  const copy = Object.create(error) as SkepError
  Object.defineProperty(copy, 'message', { value: `${name}: ${message}` })
  return copy
}

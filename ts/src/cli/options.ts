/** The options of `skep run`, in one table: the parser, the help, the completions and the documentation come from here. */
import { resolve } from 'node:path'
import { checkSlot, parseCpus, parseLpc, parseMemory, parsePin, parseSerial } from '../bhyve/args.js'
import { cpuModels, parseCpu } from '../config/cpu.js'
import { engines } from '../config/engine.js'
import { UsageError } from './context.js'
import { parseDuration, parseNanoseconds } from './duration.js'

/** A configuration while it is put together: not checked yet. */
export type Draft = Record<string, unknown>

/** What `skep run` does beside running the configuration. */
export interface RunSettings {
  json: boolean
  printConfig: boolean
  timeout: number | undefined
  image: string | undefined
  config: string | undefined
}

/** One option. */
export interface RunOption {
  /** As commander takes it. */
  readonly flags: string
  /** One line for the help. */
  readonly about: string
  /** Heading in the help. */
  readonly group: 'Guest:' | 'Machine:' | 'Running:'
  /** May be given more than once. */
  readonly repeatable?: boolean
  /** The values there are. */
  readonly choices?: readonly string[]
  /** What completions offer. */
  readonly complete?: 'file' | 'image' | 'cpu'
  /** Where in the configuration it goes; errors there are told by the option's name. */
  readonly path?: string
  /** Puts a value into the configuration or the settings. */
  apply(value: string, draft: Draft, settings: RunSettings): void
}

/** An empty path stays one, for the check of the configuration to refuse. */
const file = (value: string): string => (value === '' ? '' : resolve(value))

function isObject(value: unknown): value is Draft {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function object(draft: Draft, key: string): Draft {
  const value = draft[key]
  if (isObject(value)) return value
  const created: Draft = {}
  draft[key] = created
  return created
}

/** An option with a short form that gives one value: `cpus: 2` becomes `cpus: { cores: 2 }`. */
function expanded(draft: Draft, key: string, short: string): Draft {
  const value = draft[key]
  if (value !== undefined && !isObject(value)) draft[key] = { [short]: value }
  return object(draft, key)
}

/** What is booted, when the command line says something else than the configuration: the kind changes with it. */
function boot(draft: Draft, kind: 'kernel' | 'rom'): Draft {
  const current = object(draft, 'boot')
  const other = kind === 'kernel' ? 'rom' : 'kernel'
  if (!(other in current) && current['kind'] !== other) return current
  const created: Draft = {}
  draft['boot'] = created
  return created
}

function lpc(draft: Draft): Draft {
  const bridge = object(object(draft, 'devices'), '0:31:0')
  bridge['type'] ??= 'lpc'
  return bridge
}

/** An option that says whether an instruction leaves the guest. */
function exit(key: 'hlt' | 'pause', on: boolean): Pick<RunOption, 'group' | 'path' | 'apply'> {
  return {
    group: 'Machine:',
    path: `exits.${key}`,
    apply: (_, draft) => {
      object(draft, 'exits')[key] = on
    },
  }
}

function serialFile<S>(serial: S): S | `file:${string}` {
  return typeof serial === 'string' && serial.startsWith('file:') ? `file:${file(serial.slice(5))}` : serial
}

/** The table. */
export const runOptions: readonly RunOption[] = [
  {
    flags: '--kernel <file>',
    about: 'kernel to boot: Linux bzImage, PVH or multiboot ELF',
    group: 'Guest:',
    complete: 'file',
    path: 'boot.kernel',
    apply: (value, draft) => {
      boot(draft, 'kernel')['kernel'] = file(value)
    },
  },
  {
    flags: '--initrd <file>',
    about: 'initial RAM disk',
    group: 'Guest:',
    complete: 'file',
    path: 'boot.initrd',
    apply: (value, draft) => {
      boot(draft, 'kernel')['initrd'] = file(value)
    },
  },
  {
    flags: '--cmdline <text>',
    about: "the kernel's command line",
    group: 'Guest:',
    path: 'boot.cmdline',
    apply: (value, draft) => {
      boot(draft, 'kernel')['cmdline'] = value
    },
  },
  {
    flags: '--module <file[,text]>',
    about: 'file for a multiboot or PVH kernel, with its command line',
    group: 'Guest:',
    repeatable: true,
    complete: 'file',
    path: 'boot.modules',
    apply: (value, draft) => {
      const current = boot(draft, 'kernel')
      const comma = value.indexOf(',')
      const path = comma < 0 ? value : value.slice(0, comma)
      const cmdline = comma < 0 ? '' : value.slice(comma + 1)
      const modules = Array.isArray(current['modules']) ? current['modules'] : []
      current['modules'] = [...modules, { path: file(path), cmdline }]
    },
  },
  {
    flags: '--rom <file>',
    about: 'firmware to start at the reset vector instead of a kernel, up to 16 MiB',
    group: 'Guest:',
    complete: 'file',
    path: 'boot.rom',
    apply: (value, draft) => {
      boot(draft, 'rom')['rom'] = file(value)
    },
  },
  {
    flags: '--image <name>',
    about: 'guest image to boot, prepared if need be (see skep image list)',
    group: 'Guest:',
    complete: 'image',
    apply: (value, _, settings) => {
      settings.image = value
    },
  },
  {
    flags: '-c, --cpus <n>',
    about: 'processors, 1 to 64, or sockets=n,cores=n,threads=n (default: 1)',
    group: 'Machine:',
    path: 'cpus',
    apply: (value, draft) => {
      const cpus = parseCpus(value)
      const pin = isObject(draft['cpus']) ? draft['cpus']['pin'] : undefined
      if (pin === undefined) draft['cpus'] = cpus
      else draft['cpus'] = { ...(isObject(cpus) ? cpus : { cores: cpus }), pin }
    },
  },
  {
    flags: '--cpu <model>',
    about: `processor: ${cpuModels.join(', ')}; then ,+feature and ,-feature (default: host)`,
    group: 'Machine:',
    complete: 'cpu',
    path: 'cpu',
    apply: (value, draft) => {
      const parsed = parseCpu(value)
      if (parsed === undefined) {
        throw new UsageError(
          `--cpu: expected MODEL,+FEATURE,-FEATURE such as x86-64-v2,+aes, got ${JSON.stringify(value)}`,
        )
      }
      // A model starts afresh; features alone go on top of what the configuration says.
      const current = typeof draft['cpu'] === 'string' ? { model: draft['cpu'] } : { ...object(draft, 'cpu') }
      const cpu: Draft = parsed.model === undefined ? current : { model: parsed.model }
      cpu['features'] = { ...object(cpu, 'features'), ...parsed.features }
      draft['cpu'] = cpu
    },
  },
  {
    flags: '-m, --memory <size>',
    about: 'memory such as 512M or 2G; a bare number is MiB (default: 256M)',
    group: 'Machine:',
    path: 'memory',
    apply: (value, draft) => {
      if (isObject(draft['memory'])) draft['memory']['size'] = parseMemory(value)
      else draft['memory'] = parseMemory(value)
    },
  },
  {
    flags: '-S, --wired',
    about: "take all memory at once and lock it, as bhyve's -S",
    group: 'Machine:',
    path: 'memory.wired',
    apply: (_, draft) => {
      expanded(draft, 'memory', 'size')['wired'] = true
    },
  },
  {
    flags: '--huge-pages <kind>',
    about: 'back memory with huge pages: transparent ones, or from the pool (default: auto)',
    group: 'Machine:',
    choices: ['auto', 'off', 'thp', '2M', '1G'],
    path: 'memory.hugePages',
    apply: (value, draft) => {
      expanded(draft, 'memory', 'size')['hugePages'] = value === 'off' ? false : value
    },
  },
  {
    flags: '-p, --pin <vcpu:hostcpu>',
    about: "run a processor on a host CPU, as bhyve's -p; again for the same one adds to it",
    group: 'Machine:',
    repeatable: true,
    path: 'cpus.pin',
    apply: (value, draft) => {
      const { vcpu, hostCpu } = parsePin(value)
      const pin = object(expanded(draft, 'cpus', 'cores'), 'pin')
      pin[vcpu] = [pin[vcpu] ?? []].flat().concat(hostCpu)
    },
  },
  {
    flags: '--accel <way>',
    about: 'what runs the processors (default: auto)',
    group: 'Machine:',
    choices: ['auto', 'kvm', 'software'],
    path: 'accel',
    apply: (value, draft) => {
      draft['accel'] = value
    },
  },
  {
    flags: '--engine <which>',
    about: 'engine of the software CPU; lockstep, for diagnosis, compares the others (default: auto)',
    group: 'Machine:',
    choices: ['auto', ...engines],
    path: 'engine',
    apply: (value, draft) => {
      draft['engine'] = value
    },
  },
  {
    flags: '-H, --hlt-exit',
    about: "a halted processor gives its host CPU back, as bhyve's -H (default)",
    ...exit('hlt', true),
  },
  {
    flags: '--no-hlt-exit',
    about: 'a halted processor keeps its host CPU, as bhyve does without -H',
    ...exit('hlt', false),
  },
  {
    flags: '-P, --pause-exit',
    about: "a processor that spins on PAUSE lets others run, as bhyve's -P (default)",
    ...exit('pause', true),
  },
  {
    flags: '--no-pause-exit',
    about: 'a processor may spin on PAUSE, as in bhyve without -P',
    ...exit('pause', false),
  },
  {
    flags: '--halt-poll <time>',
    about: 'for how long a halted processor polls: 200us, 1ms, 0 (default: as the host does)',
    group: 'Machine:',
    path: 'exits.haltPoll',
    apply: (value, draft) => {
      const time = parseNanoseconds(value)
      if (time === undefined) {
        const message = `--halt-poll: expected a time up to 1s such as 200us or 1ms, got ${JSON.stringify(value)}`
        throw new UsageError(message)
      }
      object(draft, 'exits')['haltPoll'] = time
    },
  },
  {
    flags: '--serial <where>',
    about: 'serial port 1: stdio, file:PATH or none (default: stdio)',
    group: 'Machine:',
    path: 'devices["0:31:0"].com1',
    apply: (value, draft) => {
      lpc(draft)['com1'] = serialFile(parseSerial(value))
    },
  },
  {
    flags: '-l, --lpc <device,conf>',
    about: "as bhyve's -l: com1,stdio to com4,..., bootrom,FILE",
    group: 'Machine:',
    repeatable: true,
    apply: (value, draft) => {
      const argument = parseLpc(value)
      if ('rom' in argument) boot(draft, 'rom')['rom'] = file(argument.rom)
      else lpc(draft)[argument.port] = serialFile(argument.serial)
    },
  },
  {
    flags: '-s, --slot <slot,device>',
    about: "as bhyve's -s: 0,hostbridge and 31,lpc, which are there anyway",
    group: 'Machine:',
    repeatable: true,
    apply: (value) => checkSlot(value),
  },
  {
    flags: '--debug-exit',
    about: 'a write to port 0xf4 ends the machine with status (value << 1) | 1',
    group: 'Machine:',
    path: 'debugExit',
    apply: (_, draft) => {
      draft['debugExit'] = true
    },
  },
  {
    flags: '--on-reboot <what>',
    about: 'whether a reboot ends the machine, as in bhyve, or starts it again (default: exit)',
    group: 'Machine:',
    choices: ['exit', 'restart'],
    path: 'onReboot',
    apply: (value, draft) => {
      draft['onReboot'] = value
    },
  },
  {
    flags: '--config <file>',
    about: 'configuration to start from, JSON; options change it',
    group: 'Running:',
    complete: 'file',
    apply: (value, _, settings) => {
      settings.config = value
    },
  },
  {
    flags: '--print-config',
    about: 'print the resolved configuration and run nothing',
    group: 'Running:',
    apply: (_, __, settings) => {
      settings.printConfig = true
    },
  },
  {
    flags: '--timeout <time>',
    about: 'end the machine after that time: 90 (seconds), 500ms, 2m',
    group: 'Running:',
    apply: (value, _, settings) => {
      settings.timeout = parseDuration(value)
      if (settings.timeout === undefined) {
        throw new UsageError(
          `--timeout: expected a time such as 90 (seconds), 500ms or 2m, got ${JSON.stringify(value)}`,
        )
      }
    },
  },
  {
    flags: '--json',
    about: 'print events and console output as JSON, one value a line',
    group: 'Running:',
    apply: (_, __, settings) => {
      settings.json = true
    },
  },
]

/** The long name of an option: `--memory`. */
export function longName(option: RunOption): string {
  return /--[\w-]+/.exec(option.flags)?.[0] ?? option.flags
}

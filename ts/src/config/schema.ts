/** The schema of configurations. It is checked against the hand-written types where this file ends. */
import { z } from 'zod'
import { type CpuFeature, cpuFeatures, cpuModels } from './cpu.js'
import { configOptions } from './options.js'
import { parseSize } from './size.js'
import type { VmConfig } from './types.js'

/** Most processors of a machine. */
export const maxCpus = 64
/** Highest number of a host CPU. */
export const maxHostCpu = 8191
/** Longest polling of a halted processor in ns. */
const maxHaltPoll = 1_000_000_000
/** Granule of memory sizes in bytes. */
export const memoryGranule: number = 2 ** 20
/** Least and most memory in bytes. */
export const memoryRange: { readonly least: number; readonly most: number } = { least: 2 * 2 ** 20, most: 16 * 2 ** 40 }
const maxText = 65_536
const maxModules = 64

const bytes = (text: string): number => Buffer.byteLength(text)
const isText = (text: string): boolean => bytes(text) <= maxText && !text.includes('\0')
// biome-ignore lint/suspicious/noControlCharactersInRegex: that is what is looked for
const controls = /[\u0000-\u001f\u007f-\u009f]/

const path = z.string().min(1).refine(isText)
const text = z.string().refine(isText)
const factor = z.int().min(1).max(maxCpus)

const hostCpu = z.int().min(0).max(maxHostCpu)
const pin = z.record(
  z.string().regex(/^(0|[1-9]\d{0,3})$/),
  z.union([
    hostCpu,
    z
      .array(hostCpu)
      .min(1)
      .max(maxHostCpu + 1),
  ]),
)

const topology = z
  .strictObject({
    sockets: factor.optional(),
    cores: factor.optional(),
    threads: factor.optional(),
    pin: pin.optional(),
  })
  .refine(({ sockets = 1, cores = 1, threads = 1 }) => sockets * cores * threads <= maxCpus)

const model = z.enum(cpuModels)
const flag = z.boolean().optional()
const features = z.strictObject(
  Object.fromEntries(cpuFeatures.map((name) => [name, flag])) as Record<CpuFeature, typeof flag>,
)
const cpu = z.strictObject({ model: model.optional(), features: features.optional() })

const size = z
  .union([z.number(), z.templateLiteral([z.number(), z.enum(['K', 'M', 'G', 'T', 'k', 'm', 'g', 't'])])])
  .refine((value) => {
    const amount = parseSize(value)
    if (amount === undefined) return false
    return amount >= memoryRange.least && amount <= memoryRange.most && amount % memoryGranule === 0
  })

const memory = z.strictObject({
  size: size.optional(),
  wired: z.boolean().optional(),
  hugePages: z.union([z.literal(false), z.enum(['auto', 'thp', '2M', '1G'])]).optional(),
})

const exits = z.strictObject({
  hlt: z.boolean().optional(),
  pause: z.boolean().optional(),
  haltPoll: z.int().min(0).max(maxHaltPoll).nullable().optional(),
})

const kernelBoot = z.strictObject({
  kind: z.literal('kernel').optional(),
  kernel: path,
  initrd: path.nullable().optional(),
  cmdline: text.optional(),
  modules: z
    .array(z.strictObject({ path, cmdline: text.optional() }))
    .max(maxModules)
    .optional(),
})

const romBoot = z.strictObject({ kind: z.literal('rom').optional(), rom: path })

const serial = z.union([
  z.enum(['console', 'stdio', 'none']),
  z.templateLiteral(['file:', z.string().min(1)]),
  z.strictObject({ kind: z.literal('console') }),
  z.strictObject({ kind: z.literal('file'), path }),
  z.strictObject({ kind: z.literal('none') }),
])

const lpc = z.strictObject({
  type: z.literal('lpc'),
  com1: serial.optional(),
  com2: serial.optional(),
  com3: serial.optional(),
  com4: serial.optional(),
})

const schema = z.strictObject({
  version: z.literal(1).optional(),
  name: z
    .string()
    .refine((name) => name !== '' && bytes(name) <= 255 && !controls.test(name))
    .optional(),
  uuid: z
    .string()
    .regex(/^[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}$/i)
    .optional(),
  cpus: z.union([factor, topology]).optional(),
  cpu: z.union([model, cpu]).optional(),
  memory: z.union([size, memory]).optional(),
  accel: z.enum(['auto', 'software', 'kvm']).optional(),
  engine: z.enum(['auto', 'jit', 'interpreter', 'lockstep']).nullable().optional(),
  exits: exits.optional(),
  boot: z.union([kernelBoot, romBoot]),
  devices: z.strictObject({ '0:31:0': lpc.optional() }).optional(),
  debugExit: z.boolean().optional(),
  rtc: z.enum(['utc', 'localtime']).optional(),
  onReboot: z.enum(['restart', 'exit']).optional(),
})

/**
 * The schema of {@link VmConfig}.
 *
 * @internal
 */
export const vmConfigSchema: z.ZodType<VmConfig> = schema

/** The JSON Schema (draft 2020-12) of {@link VmConfig}, with descriptions for editors. */
export function configJsonSchema(): Record<string, unknown> {
  const json = z.toJSONSchema(schema, { io: 'input' }) as JsonNode
  describe(json, '')
  // An editor's hint in a file must not make it invalid, and it is no option of a machine.
  json.properties = { $schema: { type: 'string' }, ...json.properties }
  return {
    $schema: json['$schema'],
    title: 'A machine of skep',
    ...json,
  }
}

interface JsonNode {
  [key: string]: unknown
  description?: string
  properties?: Record<string, JsonNode>
  items?: JsonNode
  anyOf?: JsonNode[]
}

function describe(node: JsonNode, at: string): void {
  const option = configOptions.get(at)
  if (option && at !== '') node.description = option.about
  describeParts(node, at)
}

function describeParts(node: JsonNode, at: string): void {
  for (const [key, child] of Object.entries(node.properties ?? {})) {
    describe(child, /^\w+$/.test(key) ? (at === '' ? key : `${at}.${key}`) : `${at}["${key}"]`)
  }
  if (node.items) describe(node.items, `${at}[]`)
  for (const branch of node.anyOf ?? []) describeParts(branch, at)
}

type Equal<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false
type Same<A, B> = Equal<Flat<A>, Flat<B>>
type Flat<T> = T extends readonly (infer E)[] ? Flat<E>[] : T extends object ? { [K in keyof T]: Flat<T[K]> } : T

/** Fails to compile when the schema and the types part ways. */
const schemaMatchesTypes: Same<z.input<typeof schema>, VmConfig> = true
void schemaMatchesTypes

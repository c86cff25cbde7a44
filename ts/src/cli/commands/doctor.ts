/** `skep doctor`: what this host offers. */
import { engines } from '../../config/engine.js'
import { type Diagnosis, diagnose } from '../../doctor.js'
import { type Context, colors, print, status } from '../context.js'

/** Runs the command; the exit status. */
export async function doctor(options: { json?: boolean }, context: Context): Promise<number> {
  const diagnosis = diagnose()
  if (options.json) {
    await print(context.stdout, `${JSON.stringify(diagnosis, null, 2)}\n`)
    return status.ok
  }
  const color = colors(context.stdout)
  const lines = describe(diagnosis)
  const width = Math.max(...lines.map(([key]) => key.length))
  for (const [key, ...texts] of lines) {
    const [first = '', ...rest] = texts
    await print(context.stdout, `${color.bold(key.padEnd(width))}  ${first}\n`)
    for (const text of rest) await print(context.stdout, `${' '.repeat(width)}  ${text}\n`)
  }
  return status.ok
}

/** Keys, and lines for each. */
export function describe({ host, cpu, kvm, guests, accelerator, engine, limits }: Diagnosis): [string, ...string[]][] {
  const memory = `${(host.memoryBytes / 2 ** 30).toFixed(1)} GiB`
  const cpus = `${host.cpus} CPU${host.cpus === 1 ? '' : 's'}`
  return [
    ['host', `Linux ${host.kernel}, x86-64, ${cpus}, ${memory}`],
    ['processor', `${cpu.vendor}, ${cpu.model}`],
    ['virtualization', virtualization(cpu.features)],
    ['/dev/kvm', ...kvmLines(kvm)],
    ['accelerator', `${accelerator.auto} (auto): ${accelerator.reason}`, 'choose with --accel kvm|software'],
    [
      'engine',
      `${engine.auto} (auto, with the software CPU): ${engine.reason}`,
      `choose with --engine ${engines.join('|')}`,
    ],
    ['guest CPUs', ...guests.map(guestLine), 'choose with --cpu MODEL,+feature,-feature; --json lists the features'],
    ...(Object.keys(limits).length > 0 ? [['limits', ...limitLines(limits)] as [string, ...string[]]] : []),
  ]
}

function guestLine({ backEnd, models }: Diagnosis['guests'][number]): string {
  const names = (available: boolean): string =>
    models.flatMap((model) => (model.available === available ? [model.name] : [])).join(', ')
  return `${backEnd}: ${names(true)}${names(false) === '' ? '' : ` (not ${names(false)})`}`
}

function virtualization(features: Diagnosis['cpu']['features']): string {
  const has = (name: string, label: string): string => `${label} ${features[name] ? 'yes' : 'no'}`
  if (features['vmx']) return `VT-x (${has('ept', 'EPT')}, ${has('unrestrictedGuest', 'unrestricted guest')})`
  if (features['svm']) return `AMD-V (${has('npt', 'nested paging')})`
  const guest = features['hypervisor'] ? ' (it is itself a virtual machine)' : ''
  return `none: this CPU offers neither VT-x nor SVM${guest}`
}

function kvmLines(kvm: Diagnosis['kvm']): string[] {
  if (kvm.paravirtual && kvm.usable) {
    return [
      'present, paravirtual (PVM): would interpret unmodified guests slowly → not used',
      'forced with --accel kvm',
    ]
  }
  if (kvm.usable) return [`present, API version ${kvm.apiVersion ?? '?'}, has all that is needed`]
  return [kvm.error ?? (kvm.present ? 'present, but cannot be used' : 'not there')]
}

function limitLines(limits: Diagnosis['limits']): string[] {
  return Object.entries(limits).map(([name, value]) => {
    const words = name
      .replace(/Bytes$/, '')
      .replace(/([A-Z])/g, ' $1')
      .toLowerCase()
    return `${words}: ${value === null ? 'none' : amount(name, value)}`
  })
}

function amount(name: string, value: number | string | boolean): string {
  if (typeof value !== 'number' || !/Bytes$/.test(name)) return String(value)
  return value >= 2 ** 30 ? `${(value / 2 ** 30).toFixed(1)} GiB` : `${(value / 2 ** 20).toFixed(1)} MiB`
}

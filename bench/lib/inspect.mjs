// What a hypervisor's process has cost so far, seen from outside and in the same way for each.
import { readdirSync, readFileSync } from 'node:fs'

const KIB = 1024
const KVM = '/sys/kernel/debug/kvm'

const kib = (text, name) => Number(text.match(new RegExp(`^${name}:\\s*(\\d+) kB$`, 'm'))?.[1] ?? 0) * KIB

/**
 * Memory of a process in bytes. `overhead` is its proportional set size (what it shares with other processes counts in
 * part) without guest memory; guest memory are mappings as large as it (`size`, in bytes), and of those the pages that are there
 * count.
 */
export function memory(pid, size) {
  const total = kib(readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8'), 'Pss')
  const mappings = readFileSync(`/proc/${pid}/smaps`, 'utf8').split(/^(?=[0-9a-f]+-[0-9a-f]+ )/m)
  const guest = mappings
    .filter((mapping) => kib(mapping, 'Size') >= size)
    .reduce((sum, mapping) => sum + kib(mapping, 'Pss'), 0)
  return { pss: total, guest, overhead: total - guest }
}

/**
 * What the kernel's KVM has counted of the process's VMs, all vCPUs together: `exits` from the guest and their kinds
 * (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD; debugfs shows the same). Undefined without KVM or without root.
 */
export function kernelCounts(pid) {
  let folders
  try {
    // THREAD-DESCRIPTOR, of the thread that created the VM.
    const threads = new Set(readdirSync(`/proc/${pid}/task`))
    folders = readdirSync(KVM).filter((name) => threads.has(name.split('-')[0]))
  } catch {
    return undefined
  }
  if (folders.length === 0) return undefined
  const counts = {}
  for (const folder of folders) {
    for (const entry of readdirSync(`${KVM}/${folder}`, { withFileTypes: true })) {
      if (!entry.isFile()) continue
      const text = readFileSync(`${KVM}/${folder}/${entry.name}`, 'utf8').trim()
      // Histograms are left out.
      if (/^\d+$/.test(text)) counts[entry.name] = (counts[entry.name] ?? 0) + Number(text)
    }
  }
  return counts
}

// Creates, starts and kills machines one after the other, and prints as JSON what the process holds at each step.
// Arguments: configuration (JSON), number of cycles. Run with --expose-gc, in a process that does nothing else.
import { readdirSync, readFileSync, readlinkSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { Vm } from '../../dist/index.js'

const [config, cycles] = process.argv.slice(2)

function held() {
  globalThis.gc()
  const status = readFileSync('/proc/self/status', 'utf8')
  const kib = (name) => Number(status.match(new RegExp(`^${name}:\\s*(\\d+) kB`, 'm'))[1])
  const descriptors = readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      return [readlinkSync(`/proc/self/fd/${fd}`)]
    } catch {
      return [] // The one that listed the folder.
    }
  })
  return {
    descriptors: descriptors.length,
    memoryFiles: descriptors.filter((target) => target.includes('memfd:')).length,
    threads: readdirSync('/proc/self/task').length,
    mappings: readFileSync('/proc/self/maps', 'utf8').split('\n').length,
    guestMappings: (readFileSync('/proc/self/maps', 'utf8').match(/memfd:/g) ?? []).length,
    residentKib: kib('VmRSS'),
    virtualKib: kib('VmSize'),
  }
}

const samples = []
for (let cycle = 0; cycle < Number(cycles); cycle++) {
  const vm = await Vm.create(JSON.parse(config))
  await vm.start()
  // At different moments of the guest's life, the first instruction included.
  await sleep(cycle % 10)
  await vm.kill()
  const { reason } = await vm.exited
  if (reason !== 'killed') throw new Error(`cycle ${cycle} ended by ${reason}`)
  await vm[Symbol.asyncDispose]()
  samples.push(held())
}
process.stdout.write(JSON.stringify(samples))

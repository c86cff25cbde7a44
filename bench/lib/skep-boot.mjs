// Boots one guest with Skep, its console on stdout. On SIGTERM it prints the vCPUs' counters on descriptor 3 and ends.
// Arguments: one JSON object, the machine's configuration.
import { writeSync } from 'node:fs'
import { Vm } from '../../dist/index.js'

const REPORT = 3
const vm = await Vm.create(JSON.parse(process.argv[2]))
vm.console(1).pipe(process.stdout)
process.once('SIGTERM', async () => {
  const stats = await vm.stats()
  writeSync(REPORT, JSON.stringify(stats))
  await vm.kill()
  process.exit(0)
})
await vm.start()

// Boots one guest with Skep, its console on stdin and stdout. On SIGTERM it prints the vCPUs' counters on descriptor 3 and ends.
// Arguments: one JSON object, the machine's configuration.
import { writeSync } from 'node:fs'
import { Vm } from '../../dist/index.js'

const REPORT = 3
// Whoever started this shows the reason, not where it came from.
process.on('uncaughtException', (error) => {
  writeSync(2, `${error.code ?? error.name}: ${error.message}\n`)
  process.exit(1)
})
const vm = await Vm.create(JSON.parse(process.argv[2]))
const console = vm.console(1)
console.pipe(process.stdout)
process.stdin.pipe(console, { end: false })
let told = false
process.once('SIGTERM', async () => {
  told = true
  const stats = await vm.stats()
  writeSync(REPORT, JSON.stringify(stats))
  await vm.kill()
  process.exit(0)
})
await vm.start()
const { reason, status } = await vm.exited
if (!told) {
  process.stderr.write(`the machine has ended: ${reason}\n`)
  process.exit(status)
}

// What tsc leaves to do: the JSON Schema, and a command that can be executed.
import { chmodSync, writeFileSync } from 'node:fs'
import { configJsonSchema } from '../dist/config/schema.js'

const file = (path) => new URL(`../dist/${path}`, import.meta.url)

writeFileSync(file('skep.schema.json'), `${JSON.stringify(configJsonSchema(), null, 2)}\n`)
chmodSync(file('cli/main.js'), 0o755)

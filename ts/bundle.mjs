// The JavaScript of dist/, from the sources: few files, so that `import 'skep'` is fast, with zod in them. Declarations are tsc's.
import { chmodSync, copyFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { basename, extname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { build } from 'rolldown'

const path = (name) => fileURLToPath(new URL(`../${name}`, import.meta.url))

/** The package, its command, and what the scripts and tests of this repository use beside them. */
const entries = ['index', 'cli/main', 'images/apt', 'images/initramfs']

/** Removes what an earlier build has left, whose names may have been others. */
function clean(folder) {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const at = join(folder, entry.name)
    if (entry.isDirectory()) {
      if (basename(at) !== 'native') clean(at)
    } else if (['.js', '.map'].includes(extname(at))) rmSync(at)
  }
}

clean(path('dist'))
await build({
  input: Object.fromEntries(entries.map((name) => [name, path(`ts/src/${name}.ts`)])),
  platform: 'node',
  transform: { target: 'node20.19' },
  external: ['commander', 'picocolors'],
  output: {
    dir: path('dist'),
    format: 'esm',
    sourcemap: true,
    entryFileNames: '[name].js',
    // As deep as the sources, from which paths to the addon and to package.json are relative.
    chunkFileNames: 'chunks/[name].js',
  },
})
copyFileSync(path('node_modules/zod/LICENSE'), path('dist/zod.LICENSE'))
chmodSync(path('dist/cli/main.js'), 0o755)
const { configJsonSchema } = await import('../dist/index.js')
writeFileSync(path('dist/skep.schema.json'), `${JSON.stringify(configJsonSchema(), null, 2)}\n`)

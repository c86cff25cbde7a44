// Checks the licence of everything that npm and cargo bring in, and reports it. Needs no network and no extra tool.
//   node scripts/licences.mjs          fails on a licence that is not on the list
//   node scripts/licences.mjs --list   prints what there is, with sizes, as Markdown
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { manifest } from './lib/build.mjs'
import { ALLOWED, ALLOWED_FOR_TOOLS, satisfies } from './lib/licences.mjs'
import { root } from './lib/paths.mjs'
import { Failure, main, output } from './lib/run.mjs'

function bytes(folder) {
  let sum = 0
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    if (entry.name === 'node_modules' || entry.name === 'target') continue
    const path = join(folder, entry.name)
    if (entry.isDirectory()) sum += bytes(path)
    else if (entry.isFile()) sum += statSync(path).size
  }
  return sum
}

function npmPackages() {
  const { dependencies = {}, devDependencies = {} } = manifest()
  const lock = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8'))
  const list = []
  for (const [path, entry] of Object.entries(lock.packages)) {
    if (!path || entry.link || !existsSync(join(root, path, 'package.json'))) continue
    const { name, version, license, licenses } = JSON.parse(readFileSync(join(root, path, 'package.json'), 'utf8'))
    const text = license?.type ?? license ?? licenses?.map((one) => one.type ?? one).join(' OR ') ?? 'none'
    const direct = path === `node_modules/${name}` && (name in dependencies || name in devDependencies)
    list.push({ name, version, licence: text, tool: Boolean(entry.dev), direct, folder: join(root, path) })
  }
  return list
}

async function crates() {
  const text = await output('cargo', [
    'metadata',
    '--format-version',
    '1',
    '--locked',
    '--filter-platform',
    'x86_64-unknown-linux-gnu',
  ])
  if (!text) throw new Failure('cargo metadata failed: is Cargo.lock up to date?')
  const { packages, workspace_members: ours, resolve } = JSON.parse(text)
  const members = new Set(ours)
  const used = new Set(resolve.nodes.map((node) => node.id))
  const direct = new Set(
    resolve.nodes
      .filter((node) => members.has(node.id))
      .flatMap((node) => node.deps.map((dependency) => dependency.pkg)),
  )
  return packages
    .filter((one) => used.has(one.id) && !members.has(one.id))
    .map(({ id, name, version, license, manifest_path }) => ({
      name,
      version,
      licence: license ?? 'none',
      tool: false,
      direct: direct.has(id),
      folder: dirname(manifest_path),
    }))
}

function table(title, list) {
  const rows = list
    .filter((one) => one.direct)
    .sort((a, b) => a.name.localeCompare(b.name))
    .map((one) => `| ${one.name} | ${one.version} | ${one.licence} | ${(bytes(one.folder) / 1024).toFixed(0)} KiB |`)
  const rest = list.filter((one) => !one.direct)
  const size = rest.reduce((sum, one) => sum + bytes(one.folder), 0)
  const names = [...new Set(rest.map((one) => one.name))].sort()
  return [
    `## ${title}`,
    '| name | version | licence | unpacked |',
    '|---|---|---|---|',
    ...rows,
    rest.length > 0
      ? `\n${rest.length} more come with them (${(size / 1024 / 1024).toFixed(1)} MiB): ${names.join(', ')}.`
      : '',
  ].join('\n')
}

await main(async () => {
  const npm = npmPackages()
  const cargo = await crates()
  if (process.argv.includes('--list')) {
    const parts = [
      table(
        'npm, shipped',
        npm.filter((one) => !one.tool),
      ),
      table(
        'npm, for development',
        npm.filter((one) => one.tool),
      ),
      table('cargo', cargo),
    ]
    process.stdout.write(`${parts.join('\n\n')}\n`)
  }
  const refused = [...npm, ...cargo].filter((one) => !satisfies(one.licence, one.tool ? ALLOWED_FOR_TOOLS : ALLOWED))
  if (refused.length > 0) {
    throw new Failure(
      `licences that are not allowed:\n${refused.map((one) => `  ${one.name} ${one.version}: ${one.licence}`).join('\n')}`,
    )
  }
  process.stderr.write(`${npm.length} npm packages and ${cargo.length} crates: every licence is allowed\n`)
})

// From a checkout to something that runs: packages, addon, TypeScript. Each part only when its inputs have changed.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { root } from './paths.mjs'
import { skip, step } from './progress.mjs'
import { output, run } from './run.mjs'
import { fingerprint, unlessDone } from './stamps.mjs'

const MANIFESTS = ['package.json', 'package-lock.json']
const NATIVE = ['Cargo.toml', 'Cargo.lock', 'crates', 'package.json']
const TYPESCRIPT = ['ts', 'tsconfig.json', 'tsconfig.build.json', 'package.json', 'package-lock.json']

/** The C library that Node runs on, as napi names it. */
const libc = process.report.getReport().header.glibcVersionRuntime ? 'gnu' : 'musl'

/** `npm ci`, when the lock file or Node itself has changed. */
async function install() {
  const print = fingerprint(MANIFESTS, [process.version])
  const worked = await unlessDone('packages', print, ['node_modules/.package-lock.json'], () =>
    step('install npm packages', (step) =>
      run('npm', ['ci', '--no-audit', '--no-fund', '--loglevel=http'], { log: 'npm-ci', step }),
    ),
  )
  if (!worked) skip('npm packages are up to date')
}

/** The addon, with cargo's release profile. */
async function buildNative() {
  const print = fingerprint(NATIVE, [await output('rustc', ['-vV']), process.env.RUSTFLAGS ?? ''])
  const worked = await unlessDone('native', print, [`dist/native/skep.linux-x64-${libc}.node`], () =>
    step('build the engine (cargo, release)', (step) =>
      run('npm', ['run', '--silent', 'build:native'], { log: 'build-native', step, milestone: isCompiling }),
    ),
  )
  if (!worked) skip('the engine is up to date')
}

/** dist/ from ts/. */
async function buildTypeScript() {
  const worked = await unlessDone(
    'typescript',
    fingerprint(TYPESCRIPT, [process.version]),
    ['dist/index.js', 'dist/cli/main.js'],
    () =>
      step('build TypeScript (tsc)', (step) => run('npm', ['run', '--silent', 'build:ts'], { log: 'build-ts', step })),
  )
  if (!worked) skip('TypeScript is up to date')
}

/** The crates of this workspace, as milestones among a hundred dependencies. */
export const isCompiling = (line) => /^\s*(Compiling|Checking) skep-|^\s*Finished /.test(line)

/** The TypeScript part alone: enough to make images with. */
export async function buildPackage() {
  await install()
  await buildTypeScript()
}

/** Everything that `dist` needs. */
export async function build() {
  await install()
  await buildNative()
  await buildTypeScript()
}

/** The package's own description. */
export const manifest = () => JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))

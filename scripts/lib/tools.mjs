// What must be on the machine before anything can be built, and where it comes from.
import { existsSync } from 'node:fs'
import { homedir } from 'node:os'
import { delimiter, join } from 'node:path'
import { Failure, output } from './run.mjs'

const TOOLS = [
  { name: 'npm', args: ['--version'], remedy: 'sudo apt install npm' },
  {
    name: 'cargo',
    args: ['--version'],
    at: '1.95',
    remedy: 'sudo apt install rustup && rustup default stable   (Debian 12 has no rustup package: https://rustup.rs)',
  },
  { name: 'rustc', args: ['--version'], at: '1.95', remedy: 'rustup default stable && rustup update' },
  { name: 'cc', args: ['--version'], remedy: 'sudo apt install build-essential' },
  { name: 'ld', args: ['--version'], remedy: 'sudo apt install binutils' },
]

const GUEST_TOOLS = [
  {
    name: 'apt-get',
    args: ['--version'],
    remedy: 'package apt; guests are made from Debian packages, so a Debian or Ubuntu host is needed',
  },
  { name: 'dpkg-deb', args: ['--version'], remedy: 'sudo apt install dpkg' },
]

const TEST_TOOLS = [
  { name: 'as', args: ['--version'], remedy: 'sudo apt install binutils' },
  { name: 'cargo-fmt', args: ['--version'], remedy: 'rustup component add rustfmt' },
  { name: 'cargo-clippy', args: ['--version'], remedy: 'rustup component add clippy' },
]

/** Numbers of a version, compared one by one. */
function atLeast(version, wanted) {
  const have = version.split('.').map(Number)
  const want = wanted.split('.').map(Number)
  for (const [index, number] of want.entries()) {
    if ((have[index] ?? 0) !== number) return (have[index] ?? 0) > number
  }
  return true
}

/**
 * Checks this machine and throws one message that names everything missing.
 * @param {{ guests?: boolean, tests?: boolean }} needs
 */
export async function checkTools({ guests = false, tests = false } = {}) {
  const problems = []
  if (!atLeast(process.versions.node, '20.19')) {
    problems.push(
      `node ${process.versions.node} is too old, 20.19 is needed: https://nodejs.org or sudo apt install nodejs (Debian 13)`,
    )
  }
  if (process.platform !== 'linux' || process.arch !== 'x64') {
    problems.push(`Skep runs on x86-64 Linux; this is ${process.platform} on ${process.arch}`)
  }
  // rustup puts cargo into a folder that only a new login shell knows.
  const cargoBin = join(process.env.CARGO_HOME || join(homedir(), '.cargo'), 'bin')
  if (existsSync(cargoBin) && !(process.env.PATH ?? '').split(delimiter).includes(cargoBin)) {
    process.env.PATH = `${process.env.PATH}${delimiter}${cargoBin}`
  }
  const wanted = [...TOOLS, ...(guests ? GUEST_TOOLS : []), ...(tests ? TEST_TOOLS : [])]
  const answers = await Promise.all(wanted.map(({ name, args }) => output(name, args)))
  for (const [index, { name, at, remedy }] of wanted.entries()) {
    const answer = answers[index]
    const version = answer?.match(/\d+(\.\d+)+/)?.[0]
    if (answer === undefined) problems.push(`${name} is missing: ${remedy}`)
    else if (at && version && !atLeast(version, at))
      problems.push(`${name} ${version} is too old, ${at} is needed: ${remedy}`)
  }
  if (problems.length > 0)
    throw new Failure(`This machine lacks something:\n${problems.map((p) => `  ${p}`).join('\n')}`)
}

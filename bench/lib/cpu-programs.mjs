// What bench/cpu.mjs runs: the kernels of bench/cpu/guest.c, and whole programs out of Debian's packages.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { root } from '../../scripts/lib/paths.mjs'

export const SOURCES = join(root, 'bench/cpu')

/** Packages that the programs come in; what they depend on comes along. */
export const PACKAGES = [
  'busybox-static',
  'cpp',
  'libstb-dev',
  'lua5.4',
  'luajit',
  'nodejs',
  'perl-base',
  'python3-minimal',
]

/** Groups of kernels whose operations are vectors. */
export const VECTOR = ['vector']

const busybox = '/bin/busybox'
const script = (name) => `/bench/programs/${name}`

/** Whole programs: a name, what it is about, and the command. */
export const PROGRAMS = [
  { name: 'gzip', about: 'BusyBox gzip of 4 MiB', command: [busybox, 'gzip', '-c', '/bench/file'] },
  { name: 'sha256', about: "BusyBox sha256sum of gcc's cc1", command: [busybox, 'sha256sum', '/bench/cc1'] },
  { name: 'shell', about: 'BusyBox sh, arithmetic and 40 programs', command: [busybox, 'sh', script('bench.sh')] },
  {
    name: 'cc1',
    about: "gcc's compiler proper, -O2, of stb_image_write",
    command: ['/bench/cc1', '-quiet', '-fpreprocessed', '-O2', '/bench/source.i', '-o', '/dev/null'],
  },
  { name: 'python-start', about: 'CPython, an empty program', command: ['/usr/bin/python3', '-S', '-E', '-c', 'pass'] },
  {
    name: 'python',
    about: 'CPython, dictionaries, queens, objects',
    command: ['/usr/bin/python3', '-S', '-E', script('bench.py')],
  },
  { name: 'node-start', about: 'Node, an empty program', command: ['/usr/bin/node', '-e', '0'] },
  { name: 'node', about: 'Node, JSON, sort, compiled loops', command: ['/usr/bin/node', script('bench.js')] },
  { name: 'lua', about: 'Lua, calls, tables, strings', command: ['/usr/bin/lua5.4', script('bench.lua')] },
  { name: 'luajit', about: 'LuaJIT, the same script', command: ['/usr/bin/luajit', script('bench.lua')] },
  { name: 'perl', about: 'Perl, regular expressions, hashes', command: ['/usr/bin/perl', script('bench.pl')] },
].map((program) => ({ ...program, group: 'programs', unit: 'run' }))

/** The kernels, as the table in guest.c lists them. */
export function kernels() {
  const source = readFileSync(join(SOURCES, 'guest.c'), 'utf8')
  const rows = source.matchAll(/^ {4}\{"([^"]+)", "([^"]+)", "([^"]+)",/gm)
  return [...rows].map(([, name, group, unit]) => ({ name, group, unit }))
}

/** Everything there is to measure, in order. */
export const subjects = () => [...kernels(), ...PROGRAMS]

/** The order for the guest's `guest serve` that measures a subject for at least `ms`. */
export const orderFor = ({ name, command }, ms) =>
  command ? `program ${ms} ${command.join(' ')}` : `kernel ${ms} ${name}`

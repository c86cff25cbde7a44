import { type SpawnOptions, spawn, spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { parseDuration, parseNanoseconds } from '../../ts/src/cli/duration.js'
import { EscapeFilter } from '../../ts/src/cli/escape.js'
import { longName, runOptions } from '../../ts/src/cli/options.js'

// The command as it is installed: these tests need dist.
const root = new URL('../../', import.meta.url).pathname
const main = join(root, 'dist/cli/main.js')

interface Result {
  status: number | null
  signal: NodeJS.Signals | null
  stdout: string
  stderr: string
}

let folder: string
beforeAll(async () => {
  if (!existsSync(main)) throw new Error(`${main} is missing: npm run build:ts`)
  folder = await mkdtemp(join(tmpdir(), 'skep-cli-'))
})
afterAll(async () => {
  await rm(folder, { recursive: true })
})

/** Runs the command with nothing on standard input. */
async function skep(args: string[], options: SpawnOptions = {}): Promise<Result> {
  const env = { ...process.env, XDG_CACHE_HOME: join(folder, 'cache'), NO_COLOR: '1', ...options.env }
  const child = spawn(process.execPath, [main, ...args], {
    cwd: folder,
    stdio: ['ignore', 'pipe', 'pipe'],
    ...options,
    env,
  })
  let stdout = ''
  let stderr = ''
  child.stdout?.setEncoding('utf8').on('data', (chunk: string) => {
    stdout += chunk
  })
  child.stderr?.setEncoding('utf8').on('data', (chunk: string) => {
    stderr += chunk
  })
  return await new Promise((resolve, reject) => {
    child.once('error', reject)
    child.once('close', (status, signal) => resolve({ status, signal, stdout, stderr }))
  })
}

describe('mistakes', () => {
  const run = ['run', '--kernel', 'k']

  test.each<[string[], string | RegExp]>([
    [[...run, '--memroy', '1G'], 'skep: unknown option --memroy (did you mean --memory?)\n'],
    [[...run, '--memroy=1G'], 'skep: unknown option --memroy (did you mean --memory?)\n'],
    [[...run, '-x'], 'skep: unknown option -x\n'],
    [[...run, '--memory'], 'skep: option --memory wants a value\n'],
    [[...run, '--memory', 'banana'], /^skep: --memory: expected a size .*, got "banana" \[ERR_CONFIG_MEMORY\]\n$/],
    [[...run, '-m', '1M'], /^skep: --memory: .* got "1M" \[ERR_CONFIG_MEMORY\]\n$/],
    [[...run, '-m', '1'], /^skep: --memory: .* got 1048576 \[ERR_CONFIG_MEMORY\]\n$/],
    [[...run, '-m', '100T'], /^skep: --memory: .* got "100T" \[ERR_CONFIG_MEMORY\]\n$/],
    [[...run, '--cpus', '0'], /^skep: --cpus: .* got 0 \[ERR_CONFIG_CPUS\]\n$/],
    [[...run, '--cpus', '1.5'], /^skep: --cpus: .* got 1\.5 \[ERR_CONFIG_CPUS\]\n$/],
    [[...run, '--cpus', '4096'], /^skep: --cpus: .* got 4096 \[ERR_CONFIG_CPUS\]\n$/],
    [[...run, '-c', 'cpus=4,sockets=3'], /^skep: --cpus: 3 sockets .* are not 4 \[ERR_CONFIG_CPUS\]\n$/],
    [[...run, '-c', 'cors=4'], /^skep: --cpus: .*did you mean "cores"\? \[ERR_CONFIG_CPUS\]\n$/],
    [[...run, '--cpu', 'x86-64-v5'], /^skep: --cpu: expected host, .*got "x86-64-v5" \[ERR_CONFIG_CPU\]\n$/],
    [[...run, '--cpu', 'host,aes'], /^skep: --cpu: expected MODEL,\+FEATURE,-FEATURE such as .*got "host,aes"\n$/],
    [
      [...run, '--cpu', 'host,+avx52'],
      /^skep: --cpu: unknown option .*did you mean "avx2"\? \[ERR_CONFIG_UNKNOWN\]\n$/,
    ],
    [[...run, '--cpu=-ht'], /^skep: --cpu: ht is no feature of its own: it follows from cpus \[ERR_CONFIG_CPU\]\n$/],
    [[...run, '--cpu', 'host', '--cpus', '0'], /^skep: --cpus: .* got 0 \[ERR_CONFIG_CPUS\]\n$/],
    [[...run, '-p', '0-2'], /^skep: --pin: expected .*VCPU:HOSTCPU such as 0:2, got "0-2" \[ERR_CONFIG_CPUS\]\n$/],
    [[...run, '-c', '2', '-p', '2:0'], /^skep: --pin: there is no processor 2 to pin.* \[ERR_CONFIG_CPUS\]\n$/],
    [[...run, '-p', '0:0', '-c', '4096'], /^skep: --cpus: .* got 4096 \[ERR_CONFIG_CPUS\]\n$/],
    [[...run, '-S', '-m', '1M'], /^skep: --memory: .* got "1M" \[ERR_CONFIG_MEMORY\]\n$/],
    [
      [...run, '--huge-pages', '2m'],
      /^skep: --huge-pages: expected auto, off, thp, 2M, 1G, got "2m" \(did you mean 2M\?\)\n$/,
    ],
    [[...run, '--halt-poll', '2s'], /^skep: --halt-poll: expected a time up to 1s such as 200us or 1ms, got "2s"\n$/],
    [[...run, '-p', '0:8191'], /^skep: --pin: host CPU 8191 .*; choose among \d.* \[ERR_CPU_AFFINITY\]\n$/],
    [
      [...run, '--accel', 'sofware'],
      'skep: --accel: expected auto, kvm, software, got "sofware" (did you mean software?)\n',
    ],
    [
      [...run, '--engine', 'interpeter'],
      'skep: --engine: expected auto, jit, interpreter, lockstep, got "interpeter" (did you mean interpreter?)\n',
    ],
    [
      [...run, '--accel', 'kvm', '--engine', 'jit'],
      'skep: --engine: it is about the software CPU, and accel is "kvm"; leave one of them out [ERR_CONFIG_ENGINE]\n',
    ],
    [[...run, '-c', '2', '--engine', 'lockstep'], /^skep: --engine: "lockstep" runs one .* \[ERR_CONFIG_ENGINE\]\n$/],
    [[...run, '--serial', 'stdoi'], /^skep: --serial: expected stdio, none or file:PATH, .*did you mean "stdio"\?/],
    [[...run, '--on-reboot', 'stop'], /^skep: --on-reboot: expected exit, restart/],
    [[...run, '--timeout', 'soon'], /^skep: --timeout: expected a time such as 90/],
    [[...run, '--timeout', '0'], /^skep: --timeout: expected a time/],
    [[...run, '-s', '3,virtio-blk,disk.img'], /^skep: --slot: .* no virtio-blk yet \[ERR_CONFIG_UNSUPPORTED\]\n$/],
    [[...run, '-s', '3,virtio-blck'], /^skep: --slot: .*did you mean "virtio-blk"\?/],
    [[...run, '-s', '2,lpc'], /^skep: --slot: .*sits in slot 0:31:0/],
    [[...run, '-s', 'x,lpc'], /^skep: --slot: .*a slot such as 31/],
    [[...run, '-l', 'com5,stdio'], /^skep: --lpc: .*did you mean "com1"\?/],
    [[...run, '-l', 'com1,stdio', '-l', 'com2,stdio'], /both ask for stdio \[ERR_CONFIG_SERIAL\]\n$/],
    [[...run, '--rom', 'r', '--kernel', ''], /^skep: --kernel: expected a path, got "" \[ERR_CONFIG_INVALID\]\n$/],
    [['run'], /^skep: nothing to boot; give --kernel/],
    [['run', 'web1'], /^skep: nothing to boot; give --kernel/],
    [
      ['run', 'nope.json'],
      /^skep: cannot read the configuration nope\.json: there is no such file \[ERR_CONFIG_FILE\]\n/,
    ],
    [['run', 'a.json', '--config', 'b.json'], /^skep: there are two configurations/],
    [['run', '--kernel', 'k', 'a', 'b'], /^skep: run: too many operands/],
    [
      ['run', '--image', 'debian-clod'],
      /^skep: there is no image "debian-clod"; did you mean "debian-cloud"\? \[ERR_IMAGE_UNKNOWN\]\n/,
    ],
    [[], /^skep: which command\? run, doctor, image, completion/],
    [['rnu'], 'skep: unknown command rnu (did you mean run?)\n'],
    [['image'], /^skep: which command\? list, prepare, path, remove/],
    [['image', 'pepare'], 'skep: unknown command pepare (did you mean prepare?)\n'],
    [['image', 'path'], /^skep: image debian-cloud is not prepared; skep image prepare/],
    [['image', 'remove'], /^skep: remove: name is missing/],
    [['completion', 'tcsh'], /^skep: shell: expected bash, zsh, fish, got "tcsh"/],
    [['--verson'], 'skep: unknown option --verson (did you mean --version?)\n'],
  ])('%j', async (args, message) => {
    const { status, stdout, stderr } = await skep(args)
    expect(stdout).toBe('')
    if (typeof message === 'string') expect(stderr).toBe(message)
    else expect(stderr).toMatch(message)
    expect(status).toBe(4)
  })

  test('in a configuration file are told by their path', async () => {
    await writeFile(join(folder, 'bad.json'), JSON.stringify({ boot: { kernel: 'k' }, cpus: 0 }))
    const { status, stderr } = await skep(['run', 'bad.json', '-m', '512M'])
    expect(stderr).toMatch(/^skep: cpus: expected .* got 0 \[ERR_CONFIG_CPUS\]\n$/)
    expect(status).toBe(4)
  })
})

describe('the configuration', () => {
  const print = async (...args: string[]) => {
    const { status, stdout, stderr } = await skep(['run', '--print-config', ...args])
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    return JSON.parse(stdout)
  }

  test('is made of options', async () => {
    const spec = await print(
      ...[
        '--kernel',
        'k',
        '--initrd',
        'i',
        '--cmdline',
        'console=ttyS0 quiet',
        '-m',
        '512',
        '-c',
        'sockets=1,cores=2,threads=2',
      ],
      ...[
        '--serial',
        'file:log',
        '-l',
        'com2,stdio',
        '-s',
        '0,hostbridge',
        '-s',
        '31,lpc',
        '--debug-exit',
        '--module',
        'm,a b',
      ],
      'web1',
    )
    expect(spec).toMatchObject({
      name: 'web1',
      memory: { size: 512 * 2 ** 20 },
      cpus: { sockets: 1, cores: 2, threads: 2 },
      boot: {
        kernel: join(folder, 'k'),
        initrd: join(folder, 'i'),
        cmdline: 'console=ttyS0 quiet',
        modules: [{ path: join(folder, 'm'), cmdline: 'a b' }],
      },
      devices: { '0:31:0': { com1: { kind: 'file', path: join(folder, 'log') }, com2: { kind: 'console' } } },
      debugExit: true,
      onReboot: 'exit',
    })
  })

  test("knows bhyve's -H, -P, -S and -p, in any order", async () => {
    const bhyve = ['-H', '-P', '-S', '-p', '0:1', '-p', '1:0', '-p', '0:0', '-c', '2', '-m', '64M']
    for (const args of [bhyve, ['-m', '64M', '-c', '2', '-HPS', '-p', '0:1', '-p', '1:0', '-p', '0:0']]) {
      expect(await print('--kernel', 'k', ...args)).toMatchObject({
        cpus: { sockets: 1, cores: 2, threads: 1, pin: { 0: [0, 1], 1: [0] } },
        memory: { size: 64 * 2 ** 20, wired: true, hugePages: 'auto' },
        exits: { hlt: true, pause: true, haltPoll: null },
      })
    }
    const other = ['--no-hlt-exit', '--no-pause-exit', '--halt-poll', '50us', '--huge-pages', 'thp', '-c', 'cores=2']
    expect(await print('--kernel', 'k', '-p', '1:1', ...other)).toMatchObject({
      cpus: { cores: 2, pin: { 1: [1] } },
      memory: { size: 256 * 2 ** 20, wired: false, hugePages: 'thp' },
      exits: { hlt: false, pause: false, haltPoll: 50_000 },
    })
  })

  test('is what a file says, from its folder, and options change it', async () => {
    await mkdir(join(folder, 'machines'), { recursive: true })
    const config = { name: 'web2', memory: '1G', boot: { kernel: 'vmlinuz', cmdline: 'a' }, onReboot: 'restart' }
    await writeFile(join(folder, 'machines/web2.json'), JSON.stringify(config))
    const boot = { kind: 'kernel', kernel: join(folder, 'machines/vmlinuz'), initrd: null, cmdline: 'b', modules: [] }
    for (const operand of [['machines/web2.json'], ['--config', 'machines/web2.json']]) {
      const spec = await print(...operand, '--cmdline', 'b', '-c', '2')
      expect(spec).toMatchObject({
        name: 'web2',
        memory: { size: 2 ** 30 },
        cpus: { cores: 2 },
        boot,
        onReboot: 'restart',
      })
    }
    expect(await print('--config', 'machines/web2.json', '--rom', 'r', 'other')).toMatchObject({
      name: 'other',
      boot: { kind: 'rom', rom: join(folder, 'r') },
    })
  })

  test('has the processor that the last model and all features since make', async () => {
    const cpu = async (...options: string[]) => (await print('--kernel', 'k', ...options)).cpu
    expect(await cpu()).toEqual({ model: 'host', features: {} })
    expect(await cpu('--cpu', 'x86-64-v2,+aes')).toEqual({ model: 'x86-64-v2', features: { aes: true } })
    expect(await cpu('--cpu=-aes', '--cpu', '+rdrand')).toEqual({
      model: 'host',
      features: { aes: false, rdrand: true },
    })
    for (const cpu of ['x86-64-v3', { model: 'x86-64-v3', features: { aes: true } }]) {
      await writeFile(join(folder, 'cpu.json'), JSON.stringify({ boot: { kernel: 'k' }, cpu }))
      const features = typeof cpu === 'string' ? {} : cpu.features
      expect((await print('cpu.json', '--cpu=-fma')).cpu).toEqual({
        model: 'x86-64-v3',
        features: { ...features, fma: false },
      })
      expect((await print('cpu.json', '--cpu', 'host')).cpu).toEqual({ model: 'host', features: {} })
    }
  })

  test('that was printed can be run again', async () => {
    const spec = await print('--kernel', 'k', '-l', 'com2,none', '--on-reboot', 'restart')
    await writeFile(join(folder, 'spec.json'), JSON.stringify(spec))
    expect(await print('spec.json')).toEqual(spec)
  })
})

describe('help', () => {
  test('and the version go to standard output with status 0', async () => {
    const { version } = JSON.parse(await readFile(join(root, 'package.json'), 'utf8'))
    expect(await skep(['--version'])).toMatchObject({ status: 0, stdout: `${version}\n`, stderr: '' })
    for (const args of [
      ['--help'],
      ['help'],
      ['run', '--help'],
      ['help', 'run'],
      ['image', '--help'],
      ['completion', '-h'],
    ]) {
      const { status, stdout, stderr } = await skep(args)
      expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
      expect(stdout).toMatch(/^Usage: skep/)
    }
  })

  test('has every option of the table, and so has the documentation', async () => {
    const { stdout } = await skep(['run', '--help'])
    const page = await readFile(join(root, 'docs/cli.md'), 'utf8')
    for (const option of runOptions) {
      expect(stdout).toContain(option.flags)
      expect(page).toContain(`\`${option.flags}\``)
    }
    expect(new Set(runOptions.map(longName)).size).toBe(runOptions.length)
  })

  test('has no colours in a pipe, and has them when they are forced', async () => {
    expect((await skep(['--help'], { env: { NO_COLOR: '' } })).stdout).not.toContain('\x1b[')
    expect((await skep(['--help'], { env: { NO_COLOR: '', FORCE_COLOR: '1' } })).stdout).toContain('\x1b[')
    expect((await skep(['rnu'], { env: { FORCE_COLOR: '1' } })).stderr).not.toContain('\x1b[')
  })
})

describe('completions', () => {
  const has = (shell: string) => spawnSync(shell, ['-c', 'true']).status === 0

  test.each(['bash', 'zsh', 'fish'])('for %s know every command and option', async (shell) => {
    const { status, stdout } = await skep(['completion', shell])
    expect(status).toBe(0)
    for (const option of runOptions)
      expect(stdout).toContain(shell === 'fish' ? `-l ${longName(option).slice(2)}` : longName(option))
    for (const word of ['run', 'doctor', 'image', 'completion', 'prepare', 'remove', 'debian-cloud'])
      expect(stdout).toContain(word)
    const file = join(folder, `completion.${shell}`)
    await writeFile(file, stdout)
    // zsh and fish are not everywhere; what bash says is checked everywhere.
    if (shell === 'bash' || has(shell)) {
      const { status, stderr } = spawnSync(shell, ['-n', file], { encoding: 'utf8' })
      expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    }
  })

  test.each([
    ['skep ', ['run', 'doctor', 'image', 'completion']],
    ['skep ru', ['run']],
    ['skep image p', ['prepare', 'path']],
    ['skep run --mem', ['--memory']],
    ['skep run --accel ', ['auto', 'kvm', 'software']],
    ['skep run --engine ', ['auto', 'jit', 'interpreter', 'lockstep']],
    ['skep run --image ', ['debian-cloud']],
    ['skep image remove d', ['debian-cloud']],
    ['skep completion f', ['fish']],
    ['skep run --kernel vml', ['vmlinuz']],
  ])('in bash complete %j', async (line, expected) => {
    await writeFile(join(folder, 'vmlinuz'), '')
    const { stdout } = await skep(['completion', 'bash'])
    const words = line.split(' ')
    const script = `${stdout}
COMP_WORDS=(${words.map((word) => `'${word}'`).join(' ')})
COMP_CWORD=${words.length - 1}
_skep
printf '%s\\n' "\${COMPREPLY[@]}"`
    const result = spawnSync('bash', ['-c', script], { encoding: 'utf8', cwd: folder })
    expect(result.stderr).toBe('')
    expect(
      result.stdout
        .trim()
        .split('\n')
        .filter((word) => expected.includes(word))
        .sort(),
    ).toEqual([...expected].sort())
  })
})

describe('pipes', () => {
  test('a reader that leaves early ends the command quietly', async () => {
    const script = `"$0" "$1" completion zsh | head -c 1 >/dev/null; echo "\${PIPESTATUS[0]}"`
    const { stdout, stderr } = spawnSync('bash', ['-c', script, process.execPath, main], { encoding: 'utf8' })
    expect(stderr).toBe('')
    // All of it may have been written before the reader left.
    expect(stdout.trim()).toMatch(/^(0|141)$/)
  })

  test('a standard output that is full is an error', async () => {
    if (!existsSync('/dev/full')) return
    const script = `"$0" "$1" --help > /dev/full`
    const { status, stderr } = spawnSync('bash', ['-c', script, process.execPath, main], { encoding: 'utf8' })
    expect(status).toBe(4)
    expect(stderr).toMatch(/ENOSPC|no space/i)
  })
})

describe('the escape key', () => {
  const feed = (typed: string | Uint8Array, filter = new EscapeFilter()) =>
    [...filter.feed(Buffer.from(typed))].map((part) => ('data' in part ? part.data.toString('latin1') : [part.action]))

  test.each<[string, unknown[]]>([
    ['ls\r', ['ls\r']],
    ['\x03\x04\x1a', ['\x03\x04\x1a']],
    ['\x1d.', [['quit']]],
    ['a\x1d?b', ['a', ['help'], 'b']],
    ['\x1dp\x1dr', [['power-button'], ['reset']]],
    ['\x1d\x1d', ['\x1d']],
    ['\x1dx', ['\x1dx']],
    ['\x1d', []],
    ['', []],
  ])('%j', (typed, parts) => {
    expect(feed(typed)).toEqual(parts)
  })

  test('is understood however the input is cut, and loses nothing', () => {
    const keys = fc.array(fc.constantFrom('a', '\x1d', '.', '?', '\r'), { maxLength: 20 })
    fc.assert(
      fc.property(keys, (typed) => {
        const whole = feed(typed.join(''))
        const filter = new EscapeFilter()
        const pieces = typed.flatMap((key) => feed(key, filter))
        const join = (parts: (string | string[])[]) =>
          JSON.stringify(parts.flatMap((part): unknown[] => (typeof part === 'string' ? [...part] : [part])))
        expect(join(pieces)).toBe(join(whole))
      }),
    )
  })
})

test.each([
  ['0', 0],
  ['500ns', 500],
  ['200us', 200_000],
  ['1ms', 1_000_000],
  ['1s', 1_000_000_000],
  ['1001ms', undefined],
  ['200', undefined],
  ['-1ns', undefined],
  ['', undefined],
])('the time %j is %j ns', (text, ns) => {
  expect(parseNanoseconds(text)).toBe(ns)
})

test.each([
  ['90', 90_000],
  ['1.5', 1500],
  ['500ms', 500],
  ['90s', 90_000],
  ['2m', 120_000],
  ['1h', 3_600_000],
  ['0', undefined],
  ['-1', undefined],
  ['', undefined],
  ['1 s', undefined],
  ['1d', undefined],
  ['999999999999', undefined],
])('the time %j is %j ms', (text, ms) => {
  expect(parseDuration(text)).toBe(ms)
})

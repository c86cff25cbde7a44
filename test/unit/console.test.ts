import { once } from 'node:events'
import { PassThrough } from 'node:stream'
import { text } from 'node:stream/consumers'
import { setImmediate as turn } from 'node:timers/promises'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { Console, ConsolePort } from '../../ts/src/console.js'
import { PlainText } from '../../ts/src/plain.js'
import { Scrollback } from '../../ts/src/scrollback.js'

/** A console on a guest that is this test. */
function guest({ scrollback = 1024, window = 1024 } = {}) {
  const taken: Buffer[] = []
  const state = { credit: 0, room: Number.POSITIVE_INFINITY }
  const wire = {
    write: (data: Buffer) => {
      const count = Math.min(data.length, state.room)
      taken.push(Buffer.from(data.subarray(0, count)))
      state.room -= count
      return count
    },
    credit: (bytes: number) => {
      state.credit += bytes
    },
  }
  const port = new ConsolePort(1, wire, scrollback, window)
  return {
    port,
    state,
    console: new Console(port),
    say: (words: string | Buffer) => port.receive(Buffer.from(words)),
    end: () => port.end({ reason: 'power-off', status: 1 }),
    typed: () => Buffer.concat(taken).toString(),
  }
}

/** Whether a promise is still waiting. */
async function waits(promise: Promise<unknown>): Promise<boolean> {
  const pending = Symbol('pending')
  promise.catch(() => {})
  for (let i = 0; i < 5; i++) await turn()
  return (await Promise.race([promise, Promise.resolve(pending)])) === pending
}

describe('waitFor', () => {
  test('finds what comes, in pieces of any size', async () => {
    const { console, say } = guest()
    const found = console.waitFor('login: ')
    for (const letter of 'Debian\r\nguest login: ') say(letter)
    const match = await found
    expect([...match]).toEqual(['login: '])
    expect(match.before).toBe('Debian\r\nguest ')
  })

  test('finds what came before it was asked', async () => {
    const { console, say } = guest()
    say('# ')
    expect((await console.waitFor('# '))[0]).toBe('# ')
  })

  test('does not find the same text twice, and goes on behind the match', async () => {
    const { console, say } = guest()
    say('# one\n# ')
    expect((await console.waitFor('# ')).before).toBe('')
    expect((await console.waitFor('# ')).before).toBe('one\n')
    expect(await waits(console.waitFor('# '))).toBe(true)
  })

  test('gives the groups of a regular expression', async () => {
    const { console, say } = guest()
    say('port 8080 open')
    const match = await console.waitFor(/port (?<number>\d+) (open|closed)/)
    expect([...match]).toEqual(['port 8080 open', '8080', 'open'])
    expect(match.groups).toEqual({ number: '8080' })
  })

  test('with m, looks at whole lines only', async () => {
    const { console, say } = guest()
    say('# uname -a\r\nLinux gu')
    const line = console.waitFor(/^Linux .*$/m)
    expect(await waits(line)).toBe(true)
    say('est 6.1')
    expect(await waits(line)).toBe(true)
    say('\r\n# ')
    expect((await line)[0]).toBe('Linux guest 6.1')
    expect((await console.waitFor(/# $/)).before).toBe('\r\n')
  })

  test('with m, looks at the last line too when there will be no more', async () => {
    const { console, say, end } = guest()
    const line = console.waitFor(/^bye$/m)
    say('bye')
    expect(await waits(line)).toBe(true)
    end()
    expect((await line)[0]).toBe('bye')
  })

  test('the state of an expression with g or y is neither used nor changed', async () => {
    const { console, say } = guest()
    const pattern = /a/gy
    pattern.lastIndex = 7
    say('bab')
    expect((await console.waitFor(pattern)).before).toBe('b')
    expect(pattern.lastIndex).toBe(7)
  })

  test('calls at the same time see the same text', async () => {
    const { console, say } = guest()
    const both = Promise.all([console.waitFor('login: '), console.waitFor(/guest/)])
    const never = console.waitFor('panic')
    say('guest login: ')
    const [login, name] = await both
    expect(login.before).toBe('guest ')
    expect(name.before).toBe('')
    // The cursor is behind the farthest match.
    expect(await waits(console.waitFor('login'))).toBe(true)
    expect(await waits(never)).toBe(true)
  })

  test('sees text as a person does', async () => {
    const { console, say } = guest()
    say('\x1b[32mro')
    say('ot\x1b[0')
    say('m@guest:~# \x1b[6n')
    expect((await console.waitFor(/root@(\w+):~# $/))[1]).toBe('guest')
  })

  test('decodes UTF-8 across pieces', async () => {
    const { console, say } = guest()
    for (const byte of Buffer.from('grüß dich €')) say(Buffer.of(byte))
    expect((await console.waitFor('€')).before).toBe('grüß dich ')
  })

  test('fails with the output when time is up', async () => {
    const { console, say } = guest()
    say('Kernel panic - not syncing\r\n')
    const failure = console.waitFor('login: ', { timeout: 1 })
    await expect(failure).rejects.toMatchObject({
      name: 'ConsoleError',
      code: 'ERR_CONSOLE_TIMEOUT',
      message: /"login: " did not appear on console 1 within 1 ms.*\n {2}Kernel panic - not syncing$/s,
      output: 'Kernel panic - not syncing\r\n',
      details: { port: 1, timeout: 1 },
    })
  })

  test('fails with the output when the machine ends, before or after the call', async () => {
    const { console, say, end } = guest()
    const waiting = console.waitFor(/login/)
    say('bye\n')
    end()
    const failure = {
      code: 'ERR_CONSOLE_ENDED',
      output: 'bye\n',
      details: { exit: { reason: 'power-off', status: 1 } },
    }
    await expect(waiting).rejects.toMatchObject(failure)
    await expect(console.waitFor(/login/)).rejects.toMatchObject(failure)
    expect((await console.waitFor('bye'))[0]).toBe('bye')
  })

  test('is broken off by its signal, and by nothing else', async () => {
    const { console, say } = guest()
    const controller = new AbortController()
    const reason = new Error('enough')
    const waiting = console.waitFor('x', { signal: controller.signal })
    controller.abort(reason)
    await expect(waiting).rejects.toBe(reason)
    await expect(console.waitFor('x', { signal: AbortSignal.abort(reason) })).rejects.toBe(reason)
    say('x')
    expect((await console.waitFor('x'))[0]).toBe('x')
  })

  test.each([
    [5, {}, /a string or a regular expression/],
    ['x', { timeoutMs: 5 }, /no option "timeoutMs"/],
    ['x', { timeout: Number.NaN }, /got NaN/],
    ['x', { timeout: -1 }, /got -1/],
    ['x', { timeout: 2 ** 31 }, /expected milliseconds/],
  ])('refuses (%j, %j)', async (pattern, options, message) => {
    const { console } = guest()
    await expect(console.waitFor(pattern as string, options as never)).rejects.toMatchObject({
      code: 'ERR_ARGUMENT',
      message,
    })
  })

  test('forgets text that nobody has waited for, but never what is new', async () => {
    const { console, say } = guest({ scrollback: 16, window: 16 })
    say('first')
    for (let i = 0; i < 100; i++) say('x'.repeat(10_000))
    say('last')
    expect((await console.waitFor('last')).before).not.toContain('first')
  })

  test('finds a needle however the output is cut', async () => {
    const letters = fc.stringMatching(/^[ab]{0,12}$/)
    await fc.assert(
      fc.asyncProperty(
        letters,
        letters,
        fc.stringMatching(/^[ab]{1,3}$/),
        fc.array(fc.nat(5)),
        async (head, tail, needle, cuts) => {
          const { console, say, end } = guest()
          const words = head + needle + tail
          const found = console.waitFor(needle)
          let at = 0
          for (const cut of cuts) {
            say(words.slice(at, at + cut))
            at += cut
          }
          say(words.slice(at))
          end()
          expect((await found).before).toBe(words.slice(0, words.indexOf(needle)))
        },
      ),
    )
  })
})

describe('the stream', () => {
  test('starts with the scroll-back, and ends with the machine', async () => {
    const { console, say, end } = guest()
    say('before ')
    const all = text(console)
    say('after')
    end()
    expect(await all).toBe('before after')
  })

  test('shows the newest part of more output than the scroll-back holds', async () => {
    const { console, say, end } = guest({ scrollback: 8 })
    say('0123456789abcdef')
    end()
    expect(await text(console)).toBe('89abcdef')
    expect(console.tail(4).toString()).toBe('cdef')
    expect(console.tail(100).toString()).toBe('89abcdef')
  })

  test('can be piped', async () => {
    const { console, say, end } = guest()
    const sink = new PassThrough()
    console.pipe(sink)
    const all = text(sink)
    say('a')
    await turn()
    say('b')
    end()
    expect(await all).toBe('ab')
  })

  test('does not hold the guest back while nobody reads', () => {
    const { say, state } = guest({ scrollback: 16, window: 16 })
    for (let i = 0; i < 100; i++) say('0123456789abcdef')
    expect(state.credit).toBe(1600)
  })

  test('holds the guest back while a reader is slow, and loses nothing', async () => {
    const window = 64 * 1024
    const { console, say, state, end } = guest({ scrollback: window, window })
    // What Rust does: it sends no more than the window beyond what has been credited.
    const slow = new PassThrough({ highWaterMark: 1 })
    console.pipe(slow)
    await turn()
    const piece = Buffer.alloc(8 * 1024)
    let sent = 0
    const send = () => {
      while (sent + piece.length <= state.credit + window && sent < 2 ** 20) {
        piece.fill(sent / piece.length)
        say(piece)
        sent += piece.length
      }
    }
    send()
    for (let i = 0; i < 20; i++) await turn()
    send()
    for (let i = 0; i < 20; i++) await turn()
    expect(sent).toBeLessThan(2 ** 20)
    let read = 0
    const hash: number[] = []
    slow.on('data', (data: Buffer) => {
      for (let at = 0; at < data.length; at += piece.length) hash.push(data[at] ?? -1)
      read += data.length
      send()
    })
    while (sent < 2 ** 20) await turn()
    end()
    await once(slow, 'end')
    expect(read).toBe(2 ** 20)
    expect(new Set(hash).size).toBe(128)
  })

  test('lets the guest go on when the slow reader leaves', async () => {
    const { console, port, say, state, end } = guest({ scrollback: 1 << 18, window: 1 << 18 })
    const sink = new PassThrough({ highWaterMark: 1 })
    console.pipe(sink)
    await turn()
    say(Buffer.alloc(1 << 18))
    await turn()
    expect(state.credit).toBeLessThan(1 << 18)
    console.destroy()
    await turn()
    expect(state.credit).toBe(1 << 18)
    // The port goes on, and can be read anew.
    say('again')
    end()
    expect((await text(new Console(port))).endsWith('\0again')).toBe(true)
  })
})

describe('lines', () => {
  test('come without their ends, the last one when the machine ends', async () => {
    const { console, say, end } = guest()
    say('one\r\ntw')
    const lines: string[] = []
    const reading = (async () => {
      for await (const line of console.lines()) lines.push(line)
    })()
    await turn()
    say('o\n\nthree')
    await turn()
    expect(lines).toEqual(['one', 'two', ''])
    end()
    await reading
    expect(lines).toEqual(['one', 'two', '', 'three'])
  })

  test('without replay start now', async () => {
    const { console, say, end } = guest()
    say('old\n')
    const iterator = console.lines({ replay: false })
    const first = iterator.next()
    say('new\n')
    end()
    expect((await first).value).toBe('new')
  })

  test('are broken off by their signal, and do not hold the guest back after that', async () => {
    const { console, say, state } = guest({ scrollback: 16, window: 16 })
    const controller = new AbortController()
    const reading = (async () => {
      for await (const _ of console.lines({ signal: controller.signal }));
    })()
    await turn()
    controller.abort(new Error('enough'))
    await expect(reading).rejects.toThrow('enough')
    for (let i = 0; i < 10; i++) say('0123456789abcdef')
    expect(state.credit).toBe(160)
  })
})

describe('input', () => {
  test('waits while the guest takes none', async () => {
    const { console, port, state, typed } = guest()
    state.room = 3
    let written = false
    console.write('uname -a\n', () => {
      written = true
    })
    await turn()
    expect(typed()).toBe('una')
    expect(written).toBe(false)
    state.room = 4
    port.drained()
    expect(typed()).toBe('uname -')
    state.room = 100
    port.drained()
    await turn()
    expect(typed()).toBe('uname -a\n')
    expect(written).toBe(true)
  })

  test('to a machine that has ended is dropped without an error', async () => {
    const { console, state, end } = guest()
    state.room = 0
    const first = new Promise((done) => console.write('a', done))
    await turn()
    end()
    expect(await first).toBeFalsy()
    expect(await new Promise((done) => console.write('b', done))).toBeFalsy()
  })
})

describe('the parts', () => {
  test('a scroll-back holds the newest bytes and gives each at its position', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 20 }),
        fc.integer({ min: 0, max: 20 }),
        fc.array(fc.uint8Array({ maxLength: 50 })),
        (keep, room, writes) => {
          const scrollback = new Scrollback(keep, room)
          let all = Buffer.alloc(0)
          for (const data of writes) {
            scrollback.write(data)
            all = Buffer.concat([all, data])
            expect(scrollback.total).toBe(all.length)
            expect(scrollback.tail(1000)).toEqual(all.subarray(Math.max(0, all.length - keep)))
            for (const from of [0, scrollback.oldest, all.length - 1, all.length]) {
              const { start, data: got } = scrollback.read(from, 1000)
              expect(got).toEqual(all.subarray(start))
              expect(start).toBe(Math.max(from, 0, all.length - keep - room))
            }
          }
        },
      ),
    )
  })

  test('escape sequences are left out however the text is cut', () => {
    const part = fc.constantFrom(
      'a',
      'b\r\n',
      '\x1b[31m',
      '\x1b[6n',
      '\x1b]0;title\x07',
      '\x1b]8;;x\x1b\\',
      '\x1bM',
      '\x1b(B',
      '\x1b[?25h',
    )
    fc.assert(
      fc.property(fc.array(part), fc.array(fc.nat(4)), (parts, cuts) => {
        const plain = new PlainText()
        const words = parts.join('')
        let out = ''
        let at = 0
        for (const cut of cuts) {
          out += plain.write(words.slice(at, at + cut))
          at += cut
        }
        out += plain.write(words.slice(at))
        expect(out).toBe(parts.filter((one) => !one.startsWith('\x1b')).join(''))
      }),
    )
  })

  test('what only looks like the start of a sequence does not swallow the output for ever', () => {
    const plain = new PlainText()
    let out = plain.write('\x1b]')
    for (let i = 0; i < 1000; i++) out += plain.write('0123456789')
    expect(out.length).toBeGreaterThan(4000)
  })
})

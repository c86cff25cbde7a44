import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { checkSlot, parseCpus, parseLpc, parseMemory, parsePin, parseSerial } from '../../ts/src/bhyve/args.js'
import { ConfigError } from '../../ts/src/errors.js'
import { parseSlot } from '../../ts/src/pci/slot.js'

describe("bhyve's arguments", () => {
  test.each([
    ['4', 4],
    ['1.5', 1.5],
    ['banana', 'banana'],
    ['cpus=4', 4],
    ['4,sockets=2,cores=2', { sockets: 2, cores: 2 }],
    ['sockets=2,cores=2,threads=2', { sockets: 2, cores: 2, threads: 2 }],
  ])('-c %s', (text, cpus) => {
    expect(parseCpus(text)).toEqual(cpus)
  })

  test.each([
    ['512', 512 * 2 ** 20],
    ['1048576', 2 ** 20],
    ['512M', '512M'],
    ['banana', 'banana'],
  ])('-m %s', (text, memory) => {
    expect(parseMemory(text)).toBe(memory)
  })

  test.each([
    ['com1,stdio', { port: 'com1', serial: 'stdio' }],
    ['com4,file:/tmp/x,y', { port: 'com4', serial: 'file:/tmp/x,y' }],
    ['bootrom,/usr/share/fw.bin', { rom: '/usr/share/fw.bin' }],
  ])('-l %s', (text, argument) => {
    expect(parseLpc(text)).toEqual(argument)
  })

  test.each([
    ['0:2', { vcpu: '0', hostCpu: 2 }],
    ['63:8191', { vcpu: '63', hostCpu: 8191 }],
  ])('-p %s', (text, pin) => {
    expect(parsePin(text)).toEqual(pin)
  })

  test.each(['', '0', ':', '0:', ':1', '0:1:2', '00:1', '-1:0', '0:8192', '0:1,2', '1e3:0', ' 0:1'])(
    '-p %j',
    (text) => {
      expect(() => parsePin(text)).toThrow(/VCPU:HOSTCPU such as 0:2, got/)
    },
  )

  test.each(['31,lpc', '31:0,lpc', '0:31:0,lpc', '0,hostbridge', '0:0,amd_hostbridge'])('-s %s', (text) => {
    expect(() => checkSlot(text)).not.toThrow()
  })

  test('anything else is a ConfigError, whatever is typed', () => {
    fc.assert(
      fc.property(
        fc.string(),
        fc.constantFrom<(text: string) => unknown>(parseCpus, parseMemory, parsePin, parseLpc, parseSerial, checkSlot),
        (text, parse) => {
          try {
            parse(text)
          } catch (error) {
            expect(error).toBeInstanceOf(ConfigError)
          }
        },
      ),
    )
  })
})

describe('slots', () => {
  test.each([
    ['31', '0:31:0'],
    ['3:1', '0:3:1'],
    ['255:31:7', '255:31:7'],
    ['007', '0:7:0'],
    ['32', undefined],
    ['0:0:8', undefined],
    ['256:0:0', undefined],
    ['1:2:3:4', undefined],
    ['-1', undefined],
    ['', undefined],
  ])('%j is %j', (text, slot) => {
    expect(parseSlot(text)).toBe(slot)
  })
})

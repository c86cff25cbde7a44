import { describe, expect, test } from 'vitest'
import { EventQueue, type VmEvent } from '../../ts/src/events.js'

const reset = (time: number): VmEvent => ({ type: 'reset', cause: 'host', time })

async function all(queue: EventQueue): Promise<VmEvent[]> {
  const events: VmEvent[] = []
  for await (const event of queue) events.push(event)
  return events
}

describe('a queue of events', () => {
  test('gives those that came and those that come, to the end', async () => {
    const queue = new EventQueue(undefined, () => {})
    queue.push(reset(1))
    const reading = all(queue)
    await Promise.resolve()
    queue.push(reset(2))
    queue.end()
    queue.push(reset(3))
    expect(await reading).toEqual([reset(1), reset(2)])
  })

  test('answers several who wait', async () => {
    const queue = new EventQueue(undefined, () => {})
    const both = Promise.all([queue.next(), queue.next()])
    queue.push(reset(1))
    queue.push(reset(2))
    expect((await both).map(({ value }) => value)).toEqual([reset(1), reset(2)])
  })

  test('is bounded, and says what it has dropped', async () => {
    const queue = new EventQueue(undefined, () => {})
    for (let time = 0; time < 5000; time++) queue.push(reset(time))
    queue.end()
    const events = await all(queue)
    expect(events[0]).toEqual({ type: 'lost', count: 904 })
    expect(events[1]).toEqual(reset(904))
    expect(events.at(-1)).toEqual(reset(4999))
    expect(events).toHaveLength(4097)
  })

  test('ends by its signal with the reason', async () => {
    const controller = new AbortController()
    let closed = 0
    const queue = new EventQueue(controller.signal, () => {
      closed += 1
    })
    const reading = all(queue)
    controller.abort(new Error('enough'))
    await expect(reading).rejects.toThrow('enough')
    expect(closed).toBe(1)
    await expect(all(new EventQueue(AbortSignal.abort(new Error('before')), () => {}))).rejects.toThrow('before')
  })

  test('lets go when its reader leaves', async () => {
    let closed = 0
    const queue = new EventQueue(undefined, () => {
      closed += 1
    })
    queue.push(reset(1))
    for await (const _ of queue) break
    expect(closed).toBe(1)
    expect(await queue.next()).toEqual({ done: true, value: undefined })
  })
})

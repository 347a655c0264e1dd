/** Several buses on one store, and what a caller must not be able to change behind its back. */

import assert from 'node:assert/strict'
import { describe, test } from 'vitest'
import { MemoryBus, MemoryStore, VirtualClock } from '../../src/memory/index.ts'

function pair() {
  const store = new MemoryStore()
  const [a, b] = [MemoryBus.create({ store }), MemoryBus.create({ store })]
  return { store, a, b, [Symbol.asyncDispose]: async () => void (await Promise.all([a.close(), b.close()])) }
}

const bytes = (text: string) => new TextEncoder().encode(text)
const text = (value: Uint8Array | undefined) => new TextDecoder().decode(value)

describe('a shared store', () => {
  test('buses on one store see the same, and buses without one are alone', async () => {
    await using stage = pair()
    const { a, b } = stage
    await using alone = MemoryBus.create()
    const revision = await a.kv.put('b', 'k', 'v')
    assert.equal((await b.kv.get('b', 'k'))?.revision, revision)
    assert.equal(await alone.kv.get('b', 'k'), null)
    await a.requestReply.respond('s', () => 'from a')
    assert.equal(text(await b.requestReply.request('s', '', { timeoutMs: 5_000 })), 'from a')
    await assert.rejects(alone.requestReply.request('s', '', { timeoutMs: 5_000 }), { code: 'not_found' })
  })

  test('P10 a bus that closes hands back what it held, and the others go on', async () => {
    await using stage = pair()
    const { a, b } = stage
    await a.pubsub.publishMany([1, 2, 3].map((n) => ({ subject: 's', payload: String(n) })))
    await a.jobs.enqueue('q', { payload: 'job' })
    const stream = await a.pubsub.subscribe('s', 'd')
    const { value: held } = await stream[Symbol.asyncIterator]().next()
    const job = await a.jobs.claim('q', 'w', 60_000)
    const lease = await a.kv.lease('b', 'k', 60_000)
    await a.close()

    const seen = new Map<number, number>()
    for await (const msg of await b.pubsub.subscribe('s', 'd')) {
      seen.set(msg.seq, msg.attempt)
      if (seen.size === 3) break
    }
    // What was yielded was an attempt, what was only fetched was none.
    assert.deepEqual([...seen.entries()].sort(), [
      [1, 2],
      [2, 1],
      [3, 1],
    ])
    assert.equal((await b.jobs.claim('q', 'w', 60_000))?.attempt, 2)
    assert.ok((await b.kv.lease('b', 'k', 60_000)).fence > lease.fence)
    await assert.rejects(held.ack(), { code: 'closed' })
    await assert.rejects(async () => job?.ack(), { code: 'closed' })
    await assert.rejects(lease.heartbeat(), { code: 'closed' })
    assert.equal(lease.signal.aborted, true)
  })

  test('P4 a store outlives its buses, and time passes meanwhile', async () => {
    const clock = new VirtualClock()
    const store = new MemoryStore(clock)
    const first = MemoryBus.create({ store })
    await (await first.pubsub.subscribe('s', 'd')).close()
    await first.pubsub.publish('s', 'kept')
    await first.kv.put('b', 'k', 'v', { ttlMs: 1_000 })
    await first.close()
    await clock.advance(1_000)
    await using second = MemoryBus.create({ store })
    assert.equal(await second.kv.get('b', 'k'), null)
    for await (const msg of await second.pubsub.subscribe('s', 'd')) {
      assert.equal(text(msg.payload), 'kept')
      break
    }
  })

  test('a store goes by one clock', async () => {
    const clock = new VirtualClock()
    const store = new MemoryStore()
    await using _first = MemoryBus.create({ store, clock })
    await using _second = MemoryBus.create({ store, clock })
    await using _third = MemoryBus.create({ store })
    assert.throws(() => MemoryBus.create({ store, clock: new VirtualClock() }), { code: 'invalid_argument', message: /clock/ })
  })

  test('options that make no sense are refused, each by its name', () => {
    const refused = (options: object, name: RegExp) =>
      assert.throws(() => MemoryBus.create(options), { code: 'invalid_argument', message: name })
    refused({ store: {} }, /^store/)
    refused({ maxPayloadBytes: 0 }, /^maxPayloadBytes/)
    refused({ maxPayloadBytes: 8 * 1024 * 1024 + 1 }, /^maxPayloadBytes/)
    refused({ retention: { messagesMs: -1 } }, /^retention\.messagesMs/)
    refused({ retention: { deadJobsMs: 1.5 } }, /^retention\.deadJobsMs/)
  })
})

describe('apart from its callers', () => {
  test('what a caller does with his bytes and headers later changes nothing', async () => {
    await using bus = MemoryBus.create()
    const payload = bytes('before')
    const headers: Record<string, string> = { h: 'before' }
    const runAt = new Date(0)
    const done = [
      bus.pubsub.publish('s', payload, { headers }),
      bus.jobs.enqueue('q', { payload, headers, runAt }),
      bus.kv.put('b', 'k', payload),
    ]
    payload.set(bytes('AFTER!'))
    headers.h = 'after'
    runAt.setTime(Date.now() + 1e9)
    await Promise.all(done)
    const { value: msg } = await (await bus.pubsub.subscribe('s', 'd'))[Symbol.asyncIterator]().next()
    const job = await bus.jobs.claim('q', 'w', 1_000)
    assert.deepEqual([text(msg.payload), msg.headers], ['before', { h: 'before' }])
    assert.deepEqual([text(job?.payload), job?.headers], ['before', { h: 'before' }])
    assert.equal(text((await bus.kv.get('b', 'k'))?.value), 'before')
  })

  test('what a holder does with the bytes he got changes nothing for the next', async () => {
    await using bus = MemoryBus.create()
    await bus.pubsub.publish('s', 'whole')
    for (const durable of ['one', 'two']) {
      const messages = (await bus.pubsub.subscribe('s', durable))[Symbol.asyncIterator]()
      for (const attempt of [1, 2]) {
        const { value: msg } = await messages.next()
        assert.deepEqual([msg.attempt, text(msg.payload)], [attempt, 'whole'])
        msg.payload.fill(0)
        await msg.nak()
      }
    }

    await bus.jobs.enqueue('q', { payload: 'whole' })
    for (const attempt of [1, 2]) {
      const job = await bus.jobs.claim('q', 'w', 1_000)
      assert.deepEqual([job?.attempt, text(job?.payload)], [attempt, 'whole'])
      job?.payload.fill(0)
      await job?.nak(0)
    }

    const watches = [await bus.kv.watch('b'), await bus.kv.watch('b')]
    await bus.kv.put('b', 'k', 'whole')
    for (const watch of watches) {
      const { value: change } = await watch[Symbol.asyncIterator]().next()
      assert.equal(text(change.entry.value), 'whole')
      change.entry.value.fill(0)
    }
    const entry = await bus.kv.get('b', 'k')
    entry?.value.fill(0)
    assert.equal(text((await bus.kv.get('b', 'k'))?.value), 'whole')

    await bus.requestReply.respond('echo', ({ payload }) => payload.fill(1))
    const mine = bytes('mine')
    await bus.requestReply.request('echo', mine, { timeoutMs: 5_000 })
    assert.equal(text(mine), 'mine')
  })

  test('a call has its effect after the caller has gone on, and calls have theirs in their order', async () => {
    await using bus = MemoryBus.create()
    const order: string[] = []
    await bus.requestReply.respond('s', () => {
      order.push('handler')
      return ''
    })
    const request = bus.requestReply.request('s', '', { timeoutMs: 5_000 })
    order.push('caller')
    for (let microtask = 0; microtask < 50; microtask++) await Promise.resolve()
    order.push('his microtasks')
    await request
    assert.deepEqual(order, ['caller', 'his microtasks', 'handler'])

    const acks = await Promise.all([1, 2, 3].map((n) => bus.pubsub.publish('s', String(n))))
    assert.deepEqual(
      acks.map(({ seq }) => seq),
      [1, 2, 3],
    )
    const revisions = await Promise.all(['a', 'b', 'c'].map((value) => bus.kv.put('b', 'k', value)))
    assert.deepEqual(revisions, [...revisions].sort())
  })

  test('tx is refused by name, and nothing is written', async () => {
    await using bus = MemoryBus.create()
    const tx = {} as never
    const unsupported = { code: 'unsupported', message: /tx.*PostgresBus/ }
    await assert.rejects(bus.pubsub.publish('s', 'x', { tx }), unsupported)
    await assert.rejects(bus.jobs.enqueue('q', { payload: 'x' }, { tx }), unsupported)
    await assert.rejects(bus.kv.put('b', 'k', 'v', { tx }), unsupported)
    await bus.jobs.enqueue('q', { payload: 'x' })
    const job = await bus.jobs.claim('q', 'w', 1_000)
    await assert.rejects(async () => job?.ack({ tx }), unsupported)
    await job?.ack()
    assert.equal(await bus.kv.get('b', 'k'), null)
    assert.equal(await bus.jobs.claim('q', 'w', 1_000), null)
    assert.deepEqual(await bus.pubsub.publish('s', 'x'), { seq: 1, duplicate: false })
  })
})

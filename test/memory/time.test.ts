/** What happens by itself when time passes, to the millisecond: on a clock that the tests drive. */

import assert from 'node:assert/strict'
import { describe, test } from 'vitest'
import { MemoryBus, type MemoryBusOptions, VirtualClock } from '../../src/memory/index.ts'

const MINUTE = 60_000
const HOUR = 60 * MINUTE
const DAY = 24 * HOUR

function start(options: MemoryBusOptions = {}) {
  const clock = new VirtualClock(new Date('2020-02-02T02:02:02Z'))
  const bus = MemoryBus.create({ clock, ...options })
  return { clock, bus, [Symbol.asyncDispose]: () => bus.close() }
}

/** What a promise has come to so far. */
async function soFar<T>(promise: Promise<T>): Promise<T | 'nothing yet'> {
  for (let turn = 0; turn < 10; turn++) await new Promise((resolve) => setImmediate(resolve))
  return Promise.race([promise, Promise.resolve('nothing yet' as const)])
}

async function messages(bus: MemoryBus, filter: string, durable: string) {
  const stream = await bus.pubsub.subscribe(filter, durable)
  const iterator = stream[Symbol.asyncIterator]()
  return { stream, next: async () => (await iterator.next()).value }
}

describe('messages', () => {
  test('P5 a delivery is given on when its ack wait is over, and not a millisecond before', async () => {
    await using stage = start()
    const { clock, bus } = stage
    await bus.pubsub.publish('orders.new', 'x')
    const { next } = await messages(bus, 'orders.>', 'd')
    assert.equal((await next()).attempt, 1)
    const again = next()
    await clock.advance(29_999)
    assert.equal(await soFar(again), 'nothing yet')
    await clock.advance(1)
    assert.equal((await again).attempt, 2)
  })

  test('P5 a nak with a delay comes back when the delay is over', async () => {
    await using stage = start()
    const { clock, bus } = stage
    await bus.pubsub.publish('s', 'x')
    const { next } = await messages(bus, 's', 'd')
    await (await next()).nak(2 * DAY)
    const again = next()
    await clock.advance(2 * DAY - 1)
    assert.equal(await soFar(again), 'nothing yet')
    await clock.advance(1)
    assert.equal((await again).attempt, 2)
  })

  test('P6 the last delivery becomes a dead letter at its end though nobody fetches, and extend puts that off', async () => {
    await using stage = start()
    const { clock, bus } = stage
    await bus.pubsub.publish('s', 'x', { headers: { a: 'b' } })
    const stream = await bus.pubsub.subscribe('s', 'd', { maxDeliver: 1, ackWaitMs: 1_000 })
    const { value: msg } = await stream[Symbol.asyncIterator]().next()
    await stream.close()
    const dead = await messages(bus, 'd.dlq', 'dead')
    const letter = dead.next()
    await clock.advance(600)
    await msg.extend()
    await clock.advance(999)
    assert.equal(await soFar(letter), 'nothing yet')
    await clock.advance(1)
    assert.deepEqual((await letter).headers, {
      a: 'b',
      dlq_reason: 'max_deliver_exceeded',
      dlq_subject: 's',
      dlq_seq: '1',
      dlq_attempts: '1',
    })
  })

  test('P12 a msgId is remembered for two minutes from the first publish', async () => {
    await using stage = start()
    const { clock, bus } = stage
    assert.deepEqual(await bus.pubsub.publish('s', 'x', { msgId: 'm' }), { seq: 1, duplicate: false })
    await clock.advance(2 * MINUTE - 1)
    assert.deepEqual(await bus.pubsub.publish('t', 'y', { msgId: 'm' }), { seq: 1, duplicate: true })
    await clock.advance(1)
    assert.deepEqual(await bus.pubsub.publish('s', 'x', { msgId: 'm' }), { seq: 2, duplicate: false })
    assert.deepEqual(await bus.pubsub.publish('s', 'x', { msgId: 'm' }), { seq: 2, duplicate: true })
  })

  test('P13 a message goes when it is too old and every durable is past it, not before', async () => {
    await using stage = start({ retention: { messagesMs: HOUR } })
    const { clock, bus } = stage
    const slow = await messages(bus, 's', 'slow')
    await bus.pubsub.publish('s', 'old')
    await clock.advance(2 * HOUR)
    await bus.pubsub.publish('s', 'young')

    // Nobody may have lost it: "slow" has not seen it yet.
    assert.equal((await (await messages(bus, 's', 'early')).next()).seq, 1)
    // Handed out and unsettled keeps it as well.
    const [first, second] = [await slow.next(), await slow.next()]
    assert.equal((await (await messages(bus, 's', 'middle')).next()).seq, 1)
    await first.ack()
    await second.ack()
    await bus.pubsub.deleteDurable('early')
    await bus.pubsub.deleteDurable('middle')
    assert.equal((await (await messages(bus, 's', 'late')).next()).seq, 2)
  })

  test('P13 a pruned log neither skips nor repeats for the durables that are there', async () => {
    await using stage = start({ retention: { messagesMs: HOUR } })
    const { clock, bus } = stage
    const one = await messages(bus, 's', 'one')
    const other = await messages(bus, 's', 'other')
    const seen = { one: 0, other: 0 }
    const read = async (name: 'one' | 'other', count: number) => {
      for (const end = seen[name] + count; seen[name] < end; ) {
        const msg = await { one, other }[name].next()
        assert.equal(msg.seq, ++seen[name])
        await msg.ack()
      }
    }
    // Each round prunes what lies behind both, while they stand at different places.
    for (let round = 0; round < 3; round++) {
      await bus.pubsub.publishMany(Array.from({ length: 1_500 }, () => ({ subject: 's', payload: '' })))
      await read('one', 1_500)
      await read('other', 700)
      await clock.advance(2 * HOUR)
    }
    await read('other', 4_500 - 3 * 700)
    assert.equal(await soFar((await messages(bus, 's', 'new')).next()), 'nothing yet')
  })
})

describe('jobs', () => {
  test('J3 the last attempt becomes a dead letter when its lease runs out though nobody claims', async () => {
    await using stage = start()
    const { clock, bus } = stage
    const id = await bus.jobs.enqueue('q', { payload: 'x', maxAttempts: 1, dedupKey: 'k' })
    const job = await bus.jobs.claim('q', 'w', 5_000)
    const letter = (await messages(bus, 'q.dlq', 'dead')).next()
    await clock.advance(3_000)
    await job?.heartbeat()
    await clock.advance(4_999)
    assert.equal(await soFar(letter), 'nothing yet')
    await clock.advance(1)
    assert.deepEqual((await letter).headers, {
      dlq_reason: 'max_attempts_exceeded',
      dlq_queue: 'q',
      dlq_job_id: id,
      dlq_attempts: '1',
      dlq_dedup_key: 'k',
      dlq_error: 'the lease of the last attempt ran out',
    })
  })

  test('J4 a dead job can be looked at and put back with all its attempts, until it is too old', async () => {
    await using stage = start({ retention: { deadJobsMs: DAY } })
    const { clock, bus } = stage
    const id = await bus.jobs.enqueue('q', { payload: 'x', maxAttempts: 2, priority: 3, headers: { h: '1' } })
    await (await bus.jobs.claim('q', 'w', 1_000))?.deadLetter('broken')
    assert.equal(await bus.jobs.claim('q', 'w', 1_000), null)
    const [dead, ...others] = await bus.deadJobs('q')
    assert.deepEqual(others, [])
    assert.deepEqual(
      { ...dead, payload: String.fromCharCode(...(dead?.payload ?? [])) },
      { id, queue: 'q', payload: 'x', headers: { h: '1' }, attempts: 1, maxAttempts: 2, priority: 3, lastError: 'broken' },
    )

    assert.equal(await bus.retryDead('q', 'another'), 0)
    assert.equal(await bus.retryDead('q', id), 1)
    const again = await bus.jobs.claim('q', 'w', 1_000)
    assert.equal(again?.id, id)
    assert.equal(again?.attempt, 1)
    await again?.deadLetter('broken again')
    await clock.advance(DAY + 1)
    assert.deepEqual(await bus.deadJobs('q'), [])
    assert.equal(await bus.retryDead('q'), 0)
  })

  test('J5 an idempotency record lives for a day, and longer for as long as its job', async () => {
    await using stage = start()
    const { clock, bus } = stage
    const done = await bus.jobs.enqueue('q', { payload: '', dedupKey: 'done' })
    const late = await bus.jobs.enqueue('q', { payload: '', dedupKey: 'late', delayMs: 2 * DAY })
    await (await bus.jobs.claim('q', 'w', 1_000))?.ack()
    await clock.advance(DAY - 1)
    assert.equal(await bus.jobs.enqueue('q', { payload: '', dedupKey: 'done' }), done)
    await clock.advance(1)
    assert.equal(await bus.kv.get('dedup.q', 'done'), null)
    assert.notEqual(await bus.jobs.enqueue('q', { payload: '', dedupKey: 'done' }), done)

    assert.equal(await bus.jobs.enqueue('q', { payload: '', dedupKey: 'late' }), late)
    await clock.advance(DAY)
    const record = await bus.kv.get('dedup.q', 'late')
    assert.equal(new TextDecoder().decode(record?.value), late)
    for (const job of await bus.jobs.claimMany('q', 'w', 1_000, { limit: 10 })) await job.ack()
    // It is looked at once an hour whether its job still lives.
    await clock.advance(HOUR)
    assert.equal(await bus.kv.get('dedup.q', 'late'), null)
  })

  test('J7 a waiting claim is woken when a delay ends, and when a lease runs out', async () => {
    await using stage = start()
    const { clock, bus } = stage
    await bus.jobs.enqueue('q', { payload: '', runAt: new Date(clock.date().getTime() + 7_000) })
    const first = bus.jobs.claim('q', 'w', 5_000, { waitMs: 30_000 })
    await clock.advance(6_999)
    assert.equal(await soFar(first), 'nothing yet')
    await clock.advance(1)
    assert.equal((await first)?.attempt, 1)
    const second = bus.jobs.claim('q', 'w', 5_000, { waitMs: 30_000 })
    await clock.advance(4_999)
    assert.equal(await soFar(second), 'nothing yet')
    await clock.advance(1)
    assert.equal((await second)?.attempt, 2)
  })

  test('J7 a claim that waits sleeps until something is due', async () => {
    await using stage = start()
    const { clock, bus } = stage
    await bus.jobs.enqueueMany('q', [{ payload: '' }, { payload: '', priority: 1 }])
    await bus.jobs.claimMany('q', 'w', 60_000, { limit: 10 })
    let timers = 0
    const { setTimer } = clock
    clock.setTimer = (callback, ms) => {
      timers++
      return setTimer.call(clock, callback, ms)
    }
    const waiting = bus.jobs.claim('q', 'w', 60_000, { waitMs: 20_000 })
    await clock.advance(20_000)
    assert.equal(await waiting, null)
    assert.ok(timers <= 2, `${timers} timers`)
  })
})

describe('entries', () => {
  test('K6 an entry that expires is a deletion that watches see, with a revision of its own', async () => {
    await using stage = start()
    const { clock, bus } = stage
    const watch = await bus.kv.watch('b')
    const changes = watch[Symbol.asyncIterator]()
    const put = await bus.kv.put('b', 'k', 'v', { ttlMs: 1_000 })
    await changes.next()
    const gone = changes.next()
    await clock.advance(999)
    assert.equal(await soFar(gone), 'nothing yet')
    await clock.advance(1)
    const { value } = await gone
    assert.deepEqual(value, { operation: 'delete', key: 'k', revision: put + 1 })
    assert.ok((await bus.kv.put('b', 'k', 'v')) > put + 1)
  })

  test('K2 a later write takes the ttl of the one before it away', async () => {
    await using stage = start()
    const { clock, bus } = stage
    await bus.kv.put('b', 'k', 'short', { ttlMs: 1_000 })
    await bus.kv.put('b', 'k', 'for ever')
    await clock.advance(30 * DAY)
    assert.ok(await bus.kv.get('b', 'k'))
  })

  test('K5 a lease ends by the clock of the store, and the one who waits gets it then', async () => {
    await using stage = start()
    const { clock, bus } = stage
    const lease = await bus.kv.lease('b', 'k', 10_000)
    const waiting = bus.kv.lease('b', 'k', 10_000, { waitMs: HOUR })
    await clock.advance(9_999)
    await lease.heartbeat()
    await clock.advance(9_999)
    assert.equal(await soFar(waiting), 'nothing yet')
    assert.equal(lease.signal.aborted, false)
    await clock.advance(1)
    assert.ok((await waiting).fence > lease.fence)
    assert.equal(lease.signal.aborted, true)
    await assert.rejects(lease.heartbeat(), { code: 'lease_lost' })
  })

  test('K5 a lease that ran out is lost even if nobody took it', async () => {
    await using stage = start()
    const { clock, bus } = stage
    const lease = await bus.kv.lease('b', 'k', 10_000)
    await clock.advance(10_000)
    await assert.rejects(lease.heartbeat(), { code: 'lease_lost' })
  })
})

test('R2 a request times out by the clock of the store, and its handler learns of it', async () => {
  await using stage = start()
  const { clock, bus } = stage
  let seen: AbortSignal | undefined
  const handler = ({ signal }: { readonly signal: AbortSignal }) => {
    seen = signal
    return new Promise<string>((resolve) => signal.addEventListener('abort', () => resolve('late')))
  }
  await bus.requestReply.respond('s', handler)
  const refused = assert.rejects(bus.requestReply.request('s', '', { timeoutMs: 5_000 }), { code: 'timeout' })
  await clock.advance(4_999)
  assert.equal(seen?.aborted, false)
  await clock.advance(1)
  await refused
  assert.equal(seen?.aborted, true)
})

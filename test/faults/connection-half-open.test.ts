/**
 * Connections that a network has forgotten: neither end is told, and nothing comes any more. And one that is slow, and hands on
 * every byte by itself.
 */

import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus, Worker } from '../../src/index.ts'
import { outcome, Taker, text } from '../postgres/support/outcome.ts'
import { Relay } from '../postgres/support/relay.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { eventually } from '../support/wait.ts'
import { SlowWire } from './support/network/slow-wire.ts'

const connectionString = databaseUrl()
const schema = freshSchema()
const FOUND_OUT_MS = 45_000
const LONG_MS = 120_000

let direct: PostgresBus

beforeAll(async () => {
  direct = await PostgresBus.connect({ connectionString, schema, maintenance: false })
})

afterAll(() => direct.close())

/** Nothing is found by polling: what comes was woken by a listener that has noticed. */
const POLL_MS = 600_000

describe.concurrent('connections that went silent', () => {
  test('P14 the listener alone: noticed within 45 s, and then everything that waits has looked', { timeout: 60_000 }, async () => {
    await using relay = await Relay.start(connectionString)
    await using bus = await PostgresBus.connect({
      connectionString,
      listenConnectionString: relay.connectionString,
      schema,
      maintenance: false,
      pollIntervalMs: POLL_MS,
    })
    const name = 'listener-silent'
    const taker = new Taker(await bus.pubsub.subscribe(name, name))
    await direct.pubsub.publish(name, 'before')
    await (await taker.expect()).ack()
    await using watch = await bus.kv.watch(name, undefined, { updatesOnly: true })
    const change = watch[Symbol.asyncIterator]().next()
    const held = await direct.kv.lease(name, 'k', LONG_MS)
    const claims = [1, 2].map(() => bus.jobs.claim(name, 'w', LONG_MS, { waitMs: 30_000 }))
    const waiting = bus.kv.lease(name, 'k', LONG_MS, { waitMs: FOUND_OUT_MS })
    const message = taker.expect(FOUND_OUT_MS)
    relay.silence()
    await direct.pubsub.publish(name, 'meanwhile')
    await direct.jobs.enqueueMany(name, [{ payload: '1' }, { payload: '2' }])
    await direct.kv.put(name, 'k', 'v')
    await held.release()
    const meanwhile = await message
    expect(text(meanwhile.payload)).toBe('meanwhile')
    await meanwhile.ack()
    expect((await change).value).toMatchObject({ operation: 'put' })
    expect(new Set((await Promise.all(claims)).map((job) => text(job!.payload)))).toEqual(new Set(['1', '2']))
    await (await waiting).release()
    await direct.pubsub.publish(name, 'after')
    expect(text((await taker.expect()).payload)).toBe('after')
  })

  test('P1 one where the role’s default isolation is another: the call is told or answered within 45 s', { timeout: 60_000 }, async () => {
    await using relay = await Relay.start(connectionString)
    const url = new URL(relay.connectionString)
    url.searchParams.set('options', '-c default_transaction_isolation=serializable')
    const pool = new pg.Pool({ connectionString: url.href, max: 1, idleTimeoutMillis: 0 })
    pool.on('error', () => {}) // once the bus is closed it is ours again
    await using bus = await PostgresBus.connect({ pool, schema, maintenance: false })
    expect(await outcome(bus.kv.put('isolated', 'k', 'v'))).toBe('ok')
    relay.silence()
    // Lost in its BEGIN it was never sent, and may be sent once more; it is there once in any case.
    expect(['connection', 'ok']).toContain(await outcome(bus.pubsub.publish('isolated', 'p')))
    const taker = new Taker(await direct.pubsub.subscribe('isolated', 'isolated'))
    await (await taker.take(2_000))?.ack()
    expect(await taker.take(1_000)).toBeNull()
  })

  test('J2 the whole of a worker’s: it goes on by itself within 45 s, and its job runs', { timeout: 60_000 }, async () => {
    await using relay = await Relay.start(connectionString)
    await using bus = await PostgresBus.connect({
      connectionString: relay.connectionString,
      schema,
      maintenance: false,
      pollIntervalMs: 100,
    })
    const name = 'worker-silent'
    const ran: string[] = []
    const failures: unknown[] = []
    await using _worker = new Worker(bus.jobs, name, async (job) => void ran.push(text(job.payload)), {
      onError: (error) => void failures.push(error),
    })
    await direct.jobs.enqueue(name, { payload: 'before' })
    await eventually(() => ran.length === 1)
    relay.silence()
    await direct.jobs.enqueue(name, { payload: 'meanwhile' })
    await eventually(() => ran.length === 2, { timeoutMs: FOUND_OUT_MS })
    expect(ran).toEqual(['before', 'meanwhile'])
    for (const failure of failures) expect(failure).toMatchObject({ code: 'connection' })
    await eventually(async () => (await direct.jobs.claim(name, 'w', 1)) === null)
  })

  test('R1 R4 a responder’s: it answers again within 45 s, and requests meanwhile end in time', { timeout: 60_000 }, async () => {
    await using relay = await Relay.start(connectionString)
    await using bus = await PostgresBus.connect({
      connectionString: relay.connectionString,
      schema,
      maintenance: false,
      pollIntervalMs: 100,
    })
    const name = 'responder-silent'
    await using _responder = await bus.requestReply.respond(name, ({ payload }) => payload)
    const ask = () => direct.requestReply.request(name, 'r', { timeoutMs: 1_000 })
    expect(text(await ask())).toBe('r')
    relay.silence()
    const codes = new Set<string>()
    await eventually(
      async () => {
        const code = await outcome(ask())
        codes.add(code)
        return code === 'ok'
      },
      { timeoutMs: FOUND_OUT_MS },
    )
    for (const code of codes) expect(['ok', 'timeout', 'not_found']).toContain(code)
  })

  test('K6 J7 a watch and a claim that waits, the pool’s: the watch skips nothing, the claim is told or answered', {
    timeout: 60_000,
  }, async () => {
    await using relay = await Relay.start(connectionString)
    await using bus = await PostgresBus.connect({
      connectionString: relay.connectionString,
      schema,
      maintenance: false,
      pollIntervalMs: 100,
    })
    const name = 'watch-silent'
    await using watch = await bus.kv.watch(name)
    const changes = watch[Symbol.asyncIterator]()
    const claim = outcome(bus.jobs.claim(name, 'w', LONG_MS, { waitMs: 30_000 }))
    relay.silence()
    const startedAt = performance.now()
    for (let n = 0; n < 5; n++) await direct.kv.put(name, `k${n}`, `${n}`)
    const seen: string[] = []
    while (seen.length < 5) {
      const { value } = await changes.next()
      if (value?.operation === 'put') seen.push(text(value.entry.value))
    }
    expect(seen).toEqual(['0', '1', '2', '3', '4'])
    expect(['ok', 'connection']).toContain(await claim)
    expect(performance.now() - startedAt).toBeLessThan(FOUND_OUT_MS)
    await direct.jobs.enqueue(name, { payload: 'after' })
    expect(text((await bus.jobs.claim(name, 'w', LONG_MS, { waitMs: 5_000 }))!.payload)).toBe('after')
  })

  test('P1 they come back to life after the bus has given them up: what was sent on them is stored once', { timeout: 60_000 }, async () => {
    await using relay = await Relay.start(connectionString)
    await using bus = await PostgresBus.connect({ connectionString: relay.connectionString, schema, maintenance: false })
    const name = 'frozen'
    await bus.pubsub.publish(name, 'warm')
    relay.freeze()
    const publish = () => bus.pubsub.publish(name, 'x', { msgId: 'frozen' })
    expect(await outcome(publish())).toBe('connection')
    relay.thaw()
    await eventually(async () => expect(await outcome(publish())).toBe('ok'), { timeoutMs: 15_000 })
    const taker = new Taker(await direct.pubsub.subscribe(name, name))
    const seen = [text((await taker.expect()).payload), text((await taker.expect()).payload)]
    expect(seen).toEqual(['warm', 'x'])
    expect(await taker.take(300)).toBeNull()
  })

  test('P1 R1 K4 J2 a slow network in pieces of one byte, 50 ms each way: everything works as on any other', {
    timeout: 60_000,
  }, async () => {
    await using wire = await SlowWire.start(connectionString, 50)
    await using bus = await PostgresBus.connect({ connectionString: wire.connectionString, schema, maintenance: false })
    const name = 'slow'
    const large = 'ü'.repeat(10_000)
    const taker = new Taker(await bus.pubsub.subscribe(name, name))
    await using _responder = await bus.requestReply.respond(name, ({ payload }) => payload)
    await Promise.all([
      bus.pubsub.publish(name, large, { headers: { a: 'b' } }),
      bus.jobs.enqueue(name, { payload: large }),
      bus.kv.put(name, 'k', large),
    ])
    const message = await taker.expect(20_000)
    expect([text(message.payload), message.headers]).toEqual([large, { a: 'b' }])
    await message.ack()
    const job = await bus.jobs.claim(name, 'w', LONG_MS)
    expect(text(job!.payload)).toBe(large)
    await job!.ack()
    expect(text((await bus.kv.get(name, 'k'))!.value)).toBe(large)
    expect(text(await bus.requestReply.request(name, 'r', { timeoutMs: 20_000 }))).toBe('r')
    expect(wire.pieces).toBeGreaterThan(60_000)
  })
})

/** Who may settle a message, written out as the steps of its holder, of another member and of the reaper. */

import { describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import {
  bus,
  caller,
  connectionString,
  consumerId,
  deadLetters,
  freshDurable,
  held,
  LONG_MS,
  other,
  QUIET_MS,
  rows,
  SHORT_MS,
  schema,
  setTheStage,
  untilExpired,
  untilWaitedFor,
} from './support/messages-stage.ts'
import { outcome, Taker, text } from './support/outcome.ts'

setTheStage()

describe('a message that was handed out again', () => {
  test('P7 every settlement of the older delivery is refused and changes nothing; the newer one stands', async () => {
    await using one = await held({ ackWaitMs: SHORT_MS })
    const again = await (await one.rival()).expect()
    expect([again.seq, again.attempt]).toEqual([one.message.seq, 2])
    const before = await rows(one.durable)
    expect(await outcome(one.message.extend())).toBe('lease_lost')
    expect(await outcome(one.message.nak())).toBe('lease_lost')
    expect(await outcome(one.message.term())).toBe('lease_lost')
    expect(await outcome(one.message.ack())).toBe('lease_lost')
    expect(await rows(one.durable)).toEqual(before)
    expect(await outcome(again.ack())).toBe('ok')
    expect(await rows(one.durable)).toEqual([])
  })

  test('P7 an ack that meets the other fetch before that has committed waits for it: refused when it commits', async () => {
    await using one = await held({ ackWaitMs: SHORT_MS })
    const id = await consumerId(one.durable)
    await untilExpired(one.durable)
    await caller.query('begin')
    const { rows: fetched } = await caller.query(
      `select seq from ${schema}.fetch_messages($1, 10, 60000, 1000, null, 1000000) where seq is not null`,
      [id],
    )
    expect(fetched).toHaveLength(1)
    const ack = outcome(one.message.ack())
    await untilWaitedFor(caller)
    await caller.query('commit')
    expect(await ack).toBe('lease_lost')
    expect(await rows(one.durable)).toHaveLength(1)
  })

  test('P7 the same ack succeeds when that fetch is rolled back', async () => {
    await using one = await held({ ackWaitMs: SHORT_MS })
    const id = await consumerId(one.durable)
    await untilExpired(one.durable)
    await caller.query('begin')
    await caller.query(`select seq from ${schema}.fetch_messages($1, 10, 60000, 1000, null, 1000000)`, [id])
    const ack = outcome(one.message.ack())
    await untilWaitedFor(caller)
    await caller.query('rollback')
    expect(await ack).toBe('ok')
    expect(await rows(one.durable)).toEqual([])
  })

  test('P7 an extend that meets the other fetch before that has committed does not answer that the message is still its', async () => {
    await using one = await held({ ackWaitMs: SHORT_MS })
    const id = await consumerId(one.durable)
    await untilExpired(one.durable)
    await caller.query('begin')
    await caller.query(`select seq from ${schema}.fetch_messages($1, 10, 60000, 1000, null, 1000000)`, [id])
    const extended = outcome(one.message.extend())
    await Promise.race([extended, untilWaitedFor(caller)])
    await caller.query('commit')
    expect(await extended).toBe('lease_lost')
  })
})

describe('a message whose ack wait is over and that nobody got', () => {
  test('P7 its ack succeeds and it is never handed out again', async () => {
    await using one = await held({ ackWaitMs: SHORT_MS })
    await one.stream.close()
    await untilExpired(one.durable)
    expect(await outcome(one.message.ack())).toBe('ok')
    const rival = await one.rival()
    expect(await rival.take(QUIET_MS)).toBeNull()
  })

  test('P7 its extend takes it up again', async () => {
    await using one = await held({ ackWaitMs: 1_000 })
    await one.stream.close()
    await untilExpired(one.durable)
    expect(await outcome(one.message.extend())).toBe('ok')
    const rival = await one.rival()
    expect(await rival.take(QUIET_MS)).toBeNull()
    expect(await outcome(one.message.ack())).toBe('ok')
  })

  test('P7 of an ack and a fetch at the same moment exactly one gets it, a hundred times over', async () => {
    const durable = freshDurable()
    await using stream = await bus.pubsub.subscribe(durable, durable, { ackWaitMs: 1_000 })
    const taker = new Taker(stream)
    const sent = await bus.pubsub.publishMany(Array.from({ length: 100 }, () => ({ subject: durable, payload: 'p' })))
    const messages = []
    for (let n = 0; n < 100; n++) messages.push(await taker.expect())
    await stream.close()
    await untilExpired(durable)
    await using rivalStream = await other.pubsub.subscribe(durable, durable, { ackWaitMs: LONG_MS })
    const rival = new Taker(rivalStream)
    const first = rival.take(5_000)
    const outcomes = await Promise.all(messages.map((message) => outcome(message.ack())))
    const acked = messages.filter((_, n) => outcomes[n] === 'ok').map(({ seq }) => seq)
    const won: number[] = []
    for (let next = await first; next; next = await rival.take(QUIET_MS)) {
      expect(next.attempt).toBe(2)
      won.push(next.seq)
    }
    expect([...acked, ...won].sort((a, b) => a - b)).toEqual(sent.map(({ seq }) => seq))
  })
})

describe('settling twice', () => {
  test('P7 ack, ack and ack, nak and nak, ack: the second is already_settled, the first stands', async () => {
    for (const [first, second] of [
      ['ack', 'ack'],
      ['ack', 'nak'],
      ['nak', 'ack'],
      ['term', 'nak'],
    ] as const) {
      await using one = await held()
      await one.message[first]()
      expect(await outcome(one.message[second]())).toBe('already_settled')
      await one.stream.close()
      expect((await rows(one.durable)).map(({ token, attempt }) => [token, attempt])).toEqual(first === 'nak' ? [[null, 1]] : [])
    }
  })
})

describe('nak', () => {
  test('P5 with a delay: not before it is over and within a second after; new messages flow meanwhile', async () => {
    await using one = await held()
    const taker = await one.rival()
    await one.stream.close()
    const naked = performance.now()
    await one.message.nak(1_500)
    await bus.pubsub.publish(one.durable, 'new')
    const fresh = []
    let again = await taker.expect()
    while (again.seq !== one.message.seq) {
      fresh.push(again.seq)
      await again.ack()
      again = await taker.expect()
    }
    const after = performance.now() - naked
    expect(after).toBeGreaterThanOrEqual(1_500)
    expect(after).toBeLessThan(2_500)
    expect(again.attempt).toBe(2)
    expect(fresh).toHaveLength(1)
  })

  test('P6 of the last delivery: the dead letter is there at once, with payload, headers and its story; other durables are unaffected', async () => {
    const other_ = freshDurable()
    await using one = await held({ maxDeliver: 2 })
    await using bystander = await other.pubsub.subscribe(one.durable, other_)
    await one.message.nak()
    const last = await (await one.rival()).expect()
    expect(last.attempt).toBe(2)
    await last.nak(60_000)
    expect((await deadLetters(one.durable)).map(({ headers, payload }) => [headers, text(payload)])).toEqual([
      [{ h: 'v', dlq_reason: 'max_deliver_exceeded', dlq_subject: one.durable, dlq_seq: String(last.seq), dlq_attempts: '2' }, 'p'],
    ])
    expect(await rows(one.durable)).toEqual([])
    expect((await new Taker(bystander).expect()).seq).toBe(last.seq)
  })
})

describe('closing', () => {
  test('P10 fifty prefetched messages are with the other member at once, their attempt not counted; those that were yielded stay', async () => {
    const durable = freshDurable()
    const stream = await bus.pubsub.subscribe(durable, durable, { ackWaitMs: LONG_MS })
    const sent = await bus.pubsub.publishMany(Array.from({ length: 130 }, () => ({ subject: durable, payload: 'p' })))
    const taker = new Taker(stream)
    // The batch doubles while it is used up quickly: 16, 16, 32 and 64, of which the first is yielded.
    const yielded = []
    while (yielded.length < 65) yielded.push(await taker.expect())
    const prefetched = (await rows(durable)).length - yielded.length
    expect(prefetched).toBeGreaterThanOrEqual(50)
    await using rivalStream = await other.pubsub.subscribe(durable, durable, { ackWaitMs: LONG_MS })
    const rival = new Taker(rivalStream)
    await stream.close()
    const started = performance.now()
    const got = []
    while (got.length < sent.length - yielded.length) got.push(await rival.expect(2_000))
    expect(performance.now() - started).toBeLessThan(2_000)
    expect(got.map(({ attempt }) => attempt)).toEqual(got.map(() => 1))
    expect([...yielded, ...got].map(({ seq }) => seq).sort((a, b) => a - b)).toEqual(sent.map(({ seq }) => seq))
    expect(await rival.take(QUIET_MS)).toBeNull()
    for (const message of yielded) expect(await outcome(message.ack())).toBe('ok')
  })

  test('P10 when the bus closes, what it yielded is with the other member at once too, as the next attempt', async () => {
    const closing = await PostgresBus.connect({ connectionString, schema, maintenance: false })
    const durable = freshDurable()
    const stream = await closing.pubsub.subscribe(durable, durable, { ackWaitMs: LONG_MS })
    await bus.pubsub.publishMany(Array.from({ length: 10 }, () => ({ subject: durable, payload: 'p' })))
    const mine = new Taker(stream)
    const yielded = [await mine.expect(), await mine.expect(), await mine.expect()]
    await using rivalStream = await other.pubsub.subscribe(durable, durable, { ackWaitMs: LONG_MS })
    const rival = new Taker(rivalStream)
    await closing.close()
    const got = []
    while (got.length < 10) got.push(await rival.expect(2_000))
    const again = new Set(yielded.map(({ seq }) => seq))
    expect(got.map(({ seq, attempt }) => [seq, attempt]).sort((a, b) => a[0]! - b[0]!)).toEqual(
      got.map(({ seq }) => [seq, again.has(seq) ? 2 : 1]).sort((a, b) => a[0]! - b[0]!),
    )
    for (const message of yielded) expect(await outcome(message.ack())).toBe('closed')
  })
})

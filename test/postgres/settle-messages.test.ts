/** Who may settle a message, written out as the steps of its holder, of another member and of open transactions. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type MsgStream, PostgresBus, type PostgresTx, type SubscribeOptions } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { outcome, Taker, text } from './support/outcome.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
const SHORT_MS = 300
const LONG_MS = 60_000
/** Time in which a message that must not come would have come: more than a poll interval, also with jitter. */
const QUIET_MS = 400

let bus: PostgresBus
let other: PostgresBus
let observer: Session
let caller: Session

beforeAll(async () => {
  const options = { connectionString, schema, maintenance: false, pollIntervalMs: 100 }
  bus = await PostgresBus.connect(options)
  other = await PostgresBus.connect(options)
  observer = await session(connectionString)
  caller = await session(connectionString)
  await observer.query(`create table ${schema}.results (seq bigint not null)`)
})

afterAll(async () => {
  await Promise.all([bus.close(), other.close()])
  await observer.query(`drop schema ${schema} cascade`)
  await Promise.all([observer[Symbol.asyncDispose](), caller[Symbol.asyncDispose]()])
})

let durables = 0
/** A durable of its own, with one message handed out to `bus`; `rival()` adds a member on the other bus. */
async function held(options: SubscribeOptions = {}) {
  const durable = `d${++durables}`
  const stream = await bus.pubsub.subscribe(durable, durable, { ackWaitMs: LONG_MS, ...options })
  const { seq } = await bus.pubsub.publish(durable, 'p', { headers: { h: 'v' } })
  const message = await new Taker(stream).expect()
  expect(message.seq).toBe(seq)
  let rivalStream: MsgStream<PostgresTx> | undefined
  return {
    durable,
    stream,
    message,
    rival: async (ackWaitMs = LONG_MS) => {
      rivalStream = await other.pubsub.subscribe(durable, durable, { ...options, ackWaitMs })
      return new Taker(rivalStream)
    },
    [Symbol.asyncDispose]: async () => {
      await Promise.all([stream.close(), rivalStream?.close()])
    },
  }
}

async function rows(durable: string): Promise<Record<string, unknown>[]> {
  const answer = await observer.query(
    `select d.* from ${schema}.deliveries d join ${schema}.consumer_offsets o on o.id = d.consumer_id where o.durable = $1 order by d.seq`,
    [durable],
  )
  return answer.rows as Record<string, unknown>[]
}

async function untilExpired(durable: string): Promise<void> {
  await eventually(
    async () => {
      const answer = await observer.query(
        `select bool_and(d.visible_at <= clock_timestamp()) as over
         from ${schema}.deliveries d join ${schema}.consumer_offsets o on o.id = d.consumer_id where o.durable = $1`,
        [durable],
      )
      return (answer.rows[0] as { over: boolean }).over
    },
    { what: 'the end of the ack wait' },
  )
}

async function consumerId(durable: string): Promise<number> {
  const answer = await observer.query(`select id from ${schema}.consumer_offsets where durable = $1`, [durable])
  return (answer.rows[0] as { id: number }).id
}

async function deadLetters(durable: string): Promise<{ headers: Record<string, string>; payload: Uint8Array }[]> {
  const answer = await observer.query(`select headers, payload from ${schema}.messages where subject = $1 order by seq`, [`${durable}.dlq`])
  return answer.rows as { headers: Record<string, string>; payload: Uint8Array }[]
}

async function results(seq: number): Promise<number> {
  const answer = await observer.query(`select count(*)::int as n from ${schema}.results where seq = $1`, [seq])
  return (answer.rows[0] as { n: number }).n
}

async function untilWaitedFor(holder: Session): Promise<void> {
  await eventually(
    async () => (await observer.query('select from pg_stat_activity where $1 = any(pg_blocking_pids(pid))', [holder.pid])).rowCount === 1,
    { what: 'somebody waiting for the lock' },
  )
}

async function untilAckWaits(holder: Session): Promise<void> {
  await eventually(
    async () => {
      const { rowCount } = await observer.query(
        `select from pg_stat_activity where $1 = any(pg_blocking_pids(pid)) and query like '%ack_deliveries%'`,
        [holder.pid],
      )
      return rowCount === 1
    },
    { what: 'the ack waiting for the lock' },
  )
}

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
    const durable = `d${++durables}`
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

describe('an ack in the caller’s transaction', () => {
  test('P7 the ack wait ends meanwhile: nobody gets the message; the commit ends it, with the result there once', async () => {
    await using one = await held({ ackWaitMs: SHORT_MS })
    const rival = await one.rival()
    await caller.query('begin')
    await caller.query(`insert into ${schema}.results values ($1)`, [one.message.seq])
    await one.message.ack({ tx: caller })
    await untilExpired(one.durable)
    expect(await rival.take(QUIET_MS)).toBeNull()
    await caller.query('commit')
    expect(await rival.take(QUIET_MS)).toBeNull()
    expect(await rows(one.durable)).toEqual([])
    expect(await results(one.message.seq)).toBe(1)
  })

  test('P7 the ack wait ends meanwhile and the transaction rolls back: handed out again within a second, without the result', async () => {
    await using one = await held({ ackWaitMs: SHORT_MS })
    const rival = await one.rival()
    await caller.query('begin')
    await caller.query(`insert into ${schema}.results values ($1)`, [one.message.seq])
    await one.message.ack({ tx: caller })
    await untilExpired(one.durable)
    await caller.query('rollback')
    const again = await rival.expect(1_000)
    expect([again.seq, again.attempt]).toEqual([one.message.seq, 2])
    expect(await results(again.seq)).toBe(0)
    expect(await outcome(one.message.ack())).not.toBe('ok')
    expect(await outcome(again.ack())).toBe('ok')
  })

  test('P7 it was rolled back and another got the message: nothing was settled, so a further settlement is lease_lost', async () => {
    await using one = await held({ ackWaitMs: SHORT_MS })
    await caller.query('begin')
    await one.message.ack({ tx: caller })
    await caller.query('rollback')
    const again = await (await one.rival()).expect()
    expect(await outcome(one.message.nak())).toBe('lease_lost')
    expect(await outcome(one.message.ack())).toBe('lease_lost')
    expect(await outcome(again.ack())).toBe('ok')
  })

  test('P6 it is the last delivery and its ack wait ends meanwhile: neither a member nor the reaper dead-letters it', async () => {
    await using one = await held({ ackWaitMs: SHORT_MS, maxDeliver: 1 })
    const rival = await one.rival()
    await caller.query('begin')
    await one.message.ack({ tx: caller })
    await untilExpired(one.durable)
    expect(await rival.take(QUIET_MS)).toBeNull()
    await observer.query(`select * from ${schema}.reap_deliveries(100)`)
    expect(await deadLetters(one.durable)).toEqual([])
    await caller.query('commit')
    await observer.query(`select * from ${schema}.reap_deliveries(100)`)
    expect(await deadLetters(one.durable)).toEqual([])
    expect(await rows(one.durable)).toEqual([])
  })

  test('P7 the message was lost before: lease_lost, the transaction goes on, and rolling it back leaves no result', async () => {
    await using one = await held({ ackWaitMs: SHORT_MS })
    const again = await (await one.rival()).expect()
    await caller.query('begin')
    await caller.query(`insert into ${schema}.results values ($1)`, [one.message.seq])
    expect(await outcome(one.message.ack({ tx: caller }))).toBe('lease_lost')
    expect((await caller.query('select 1 as one')).rows).toEqual([{ one: 1 }])
    await caller.query('rollback')
    expect(await results(one.message.seq)).toBe(0)
    expect(await outcome(again.ack())).toBe('ok')
  })

  test('P7 extend neither waits for it nor disturbs it', async () => {
    await using one = await held()
    await caller.query('begin')
    await one.message.ack({ tx: caller })
    const started = performance.now()
    await one.message.extend()
    expect(performance.now() - started).toBeLessThan(1_000)
    await caller.query('commit')
    expect(await rows(one.durable)).toEqual([])
    expect(await outcome(one.message.ack())).toBe('already_settled')
  })

  test('P7 rolled back to a savepoint it has not happened: a nak settles the message after the commit', async () => {
    await using one = await held()
    await caller.query('begin')
    await caller.query('savepoint s')
    await one.message.ack({ tx: caller })
    await caller.query('rollback to savepoint s')
    await caller.query('commit')
    expect(await outcome(one.message.nak())).toBe('ok')
    expect((await (await one.rival()).expect()).attempt).toBe(2)
  })

  test('P7 another settlement while it is open is already_settled at once', async () => {
    await using one = await held()
    await caller.query('begin')
    await one.message.ack({ tx: caller })
    for (const again of [() => one.message.ack(), () => one.message.nak(), () => one.message.term()]) {
      expect(await outcome(again())).toBe('already_settled')
    }
    await caller.query('commit')
    expect(await rows(one.durable)).toEqual([])
  })

  test('P7 the bus closes while it is open: the message is not handed out, and the commit ends it', async () => {
    const closing = await PostgresBus.connect({ connectionString, schema, maintenance: false })
    const durable = `d${++durables}`
    const stream = await closing.pubsub.subscribe(durable, durable, { ackWaitMs: LONG_MS })
    await bus.pubsub.publish(durable, 'p')
    const message = await new Taker(stream).expect()
    await caller.query('begin')
    await message.ack({ tx: caller })
    await closing.close()
    await using rival = await other.pubsub.subscribe(durable, durable)
    const taker = new Taker(rival)
    expect(await taker.take(QUIET_MS)).toBeNull()
    await caller.query('commit')
    expect(await taker.take(QUIET_MS)).toBeNull()
    expect(await rows(durable)).toEqual([])
  })

  test('P7 the message is published on and acked in one transaction: a chain of durables moves each message exactly once', async () => {
    const from = `d${++durables}`
    const to = `d${++durables}`
    await using source = await bus.pubsub.subscribe(from, from)
    await using target = await other.pubsub.subscribe(to, to)
    const sent = Array.from({ length: 20 }, (_, n) => `m${n}`)
    await bus.pubsub.publishMany(sent.map((payload) => ({ subject: from, payload })))
    const incoming = new Taker(source)
    for (let n = 0; n < sent.length; ) {
      const message = await incoming.expect()
      await caller.query('begin')
      await bus.pubsub.publish(to, message.payload, { tx: caller })
      await message.ack({ tx: caller })
      // Every third first delivery fails after it has published: what it published must not arrive.
      if (message.attempt === 1 && Number(text(message.payload).slice(1)) % 3 === 0) {
        await caller.query('rollback')
        await message.nak()
        continue
      }
      await caller.query('commit')
      n++
    }
    const outgoing = new Taker(target)
    const arrived = []
    for (let n = 0; n < sent.length; n++) {
      const message = await outgoing.expect()
      arrived.push(text(message.payload))
      await message.ack()
    }
    expect(arrived.sort()).toEqual(sent.toSorted())
    expect(await outgoing.take(QUIET_MS)).toBeNull()
  })
})

describe('an ack whose connection dies', () => {
  test('P7 another got the message since: it is refused, also where an extend beside an ack in a transaction had found the row locked', async () => {
    await using one = await held({ ackWaitMs: 2_500 })
    const rival = await one.rival()
    await caller.query('begin')
    await one.message.ack({ tx: caller })
    await eventually(async () => {
      const [row] = await rows(one.durable)
      return (row!.visible_at as Date).getTime() - Date.now() < 500
    })
    // The row is locked, so the server cannot restart the ack wait.
    await one.message.extend()
    await caller.query('rollback')
    const again = await rival.expect()
    await using blocker = await session(connectionString)
    await blocker.query('begin')
    await blocker.query(`lock table ${schema}.deliveries in access exclusive mode`)
    const ack = outcome(one.message.ack())
    // The members of other tests are gone; the rival may be waiting, too: whoever waits is ended.
    await untilAckWaits(blocker)
    await blocker.query(`select pg_terminate_backend(pid) from pg_stat_activity where $1 = any(pg_blocking_pids(pid))`, [blocker.pid])
    await blocker.query('rollback')
    expect(await ack).not.toBe('ok')
    expect(await outcome(again.ack())).toBe('ok')
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
    const other_ = `d${++durables}`
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
    const durable = `d${++durables}`
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
    const durable = `d${++durables}`
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

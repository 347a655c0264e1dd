/** What an operator does to durables and messages beside those who hold, fetch and settle them: the steps of two sessions, written out. */

import pg from 'pg'
import { describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import {
  bus,
  caller,
  connectionString,
  consumerId,
  deadLetters,
  freshDurable,
  held,
  LONG_MS,
  observer,
  other,
  QUIET_MS,
  rows,
  SHORT_MS,
  schema,
  setTheStage,
  untilExpired,
  untilWaitedFor,
} from './support/messages-stage.ts'
import { outcome, Taker } from './support/outcome.ts'

setTheStage()

const orphans = async () => {
  const { rowCount } = await observer.query(
    `select from ${schema}.deliveries d where not exists (select from ${schema}.consumer_offsets o where o.id = d.consumer_id)`,
  )
  return rowCount
}

describe('a durable that is moved', () => {
  test('A4 beside an ack in an open transaction: neither waits for the other, and what the ack ends comes again all the same', async () => {
    await using stage = await held()
    const { durable, message } = stage
    await caller.query('begin')
    await message.ack({ tx: caller })
    await bus.admin.seekDurable(durable, 'all')
    const rival = await stage.rival()
    const again = await rival.take(5_000)
    await caller.query('commit')
    expect([again?.seq, again?.attempt]).toEqual([message.seq, 1])
    await again?.ack()
    expect(await rows(durable)).toEqual([])
    expect(await orphans()).toBe(0)
  })

  test('A4 beside an ack that is rolled back: its delivery belongs to nobody, comes to nobody, and is removed', async () => {
    await using stage = await held()
    await caller.query('begin')
    await stage.message.ack({ tx: caller })
    await bus.admin.seekDurable(stage.durable, 'new')
    await caller.query('rollback')
    expect(await orphans()).toBe(1)
    // Its holder changes nothing by it.
    await outcome(stage.message.nak())
    const rival = await stage.rival()
    expect(await rival.take(QUIET_MS)).toBeNull()
    await observer.query(`select ${schema}.prune_rest(1000000, 1000)`)
    expect(await orphans()).toBe(0)
  })

  test('A6 what a move left to an open transaction holds up no upkeep: it is removed later', async () => {
    await using stage = await held()
    await caller.query('begin')
    await stage.message.ack({ tx: caller })
    await bus.admin.seekDurable(stage.durable, 'new')
    await using upkeep = await session(connectionString)
    await upkeep.query(`set lock_timeout = '2s'`)
    await upkeep.query(`select ${schema}.prune_rest(1000000, 1000)`)
    expect(await orphans()).toBe(1)
    await caller.query('rollback')
    await upkeep.query(`select ${schema}.prune_rest(1000000, 1000)`)
    expect(await orphans()).toBe(0)
  })

  test('A4 its members move with it, whatever time zone their sessions have', async () => {
    const durable = freshDurable()
    const pool = new pg.Pool({ connectionString, max: 1 })
    await pool.query(`set timezone = 'Asia/Tokyo'`)
    const member = await PostgresBus.connect({ pool, schema, maintenance: false, pollIntervalMs: 100 })
    try {
      await using stream = await member.pubsub.subscribe(durable, durable)
      const taker = new Taker(stream)
      const { seq } = await bus.pubsub.publish(durable, 'p')
      await (await taker.expect()).ack()
      // The next connection of the pool is made anew, and has the time zone of the server.
      await pool.query('select pg_terminate_backend(pg_backend_pid())').catch(() => {})
      await bus.admin.seekDurable(durable, 'all')
      expect((await taker.expect()).seq).toBe(seq)
    } finally {
      await member.close()
      await pool.end()
    }
  })

  test('A4 a fetch that waits for the durable while it is moved begins again at the new place, and repeats nothing', async () => {
    const durable = freshDurable()
    await using stream = await bus.pubsub.subscribe(durable, durable, { ackWaitMs: LONG_MS })
    const taker = new Taker(stream)
    const take = async () => {
      const message = await taker.expect()
      await message.ack()
      return new TextDecoder().decode(message.payload)
    }
    for (const payload of ['1', '2']) await bus.pubsub.publish(durable, payload)
    expect([await take(), await take()]).toEqual(['1', '2'])
    // The mover has the row; the fetch that the third message calls for waits behind it.
    await using mover = await session(connectionString)
    await mover.query('begin')
    await mover.query(`select ${schema}.seek_durable($1)`, [durable])
    await bus.pubsub.publish(durable, '3')
    const next = take()
    await untilWaitedFor(mover)
    await mover.query('commit')
    expect([await next, await take(), await take()]).toEqual(['1', '2', '3'])
    expect(await taker.take(QUIET_MS)).toBeNull()
  })

  test('A4 moves, fetches and publishes side by side lose nothing: after the last move everything comes', async () => {
    const durable = freshDurable()
    await using stream = await bus.pubsub.subscribe(durable, durable, { ackWaitMs: LONG_MS })
    await using second = await other.pubsub.subscribe(durable, durable, { ackWaitMs: LONG_MS })
    const seen = new Set<number>()
    let moved = false
    const read = async (one: typeof stream) => {
      for await (const message of one) {
        if ((await outcome(message.ack())) === 'ok' && moved) seen.add(message.seq)
      }
    }
    const reading = [read(stream), read(second)]
    const published: number[] = []
    for (let round = 0; round < 20; round++) {
      published.push((await bus.pubsub.publish(durable, `${round}`)).seq)
      if (round % 5 === 4) await other.admin.seekDurable(durable, 'all')
    }
    moved = true
    await bus.admin.seekDurable(durable, 'all')
    await eventually(async () => published.every((seq) => seen.has(seq)), { what: 'every message after the last move' })
    await Promise.all([stream.close(), second.close()])
    await Promise.all(reading)
  })

  test('A4 a durable that was deleted and made anew is another: the members of the old one end', async () => {
    const durable = freshDurable()
    await using stream = await bus.pubsub.subscribe(durable, durable)
    const before = await consumerId(durable)
    await other.pubsub.deleteDurable(durable)
    await (await other.pubsub.subscribe(durable, durable)).close()
    expect(await consumerId(durable)).not.toBe(before)
    const ended = outcome(stream[Symbol.asyncIterator]().next())
    await other.pubsub.publish(durable, 'for the new one')
    expect(await ended).toBe('not_found')
  })
})

describe('a purge', () => {
  test('A5 of a message whose last delivery is out: its end leaves no dead letter and nothing behind', async () => {
    await using stage = await held({ maxDeliver: 1 })
    expect(await bus.admin.purgeMessages(stage.durable)).toBe(1)
    await stage.message.nak()
    expect(await deadLetters(stage.durable)).toEqual([])
    expect(await rows(stage.durable)).toEqual([])
  })

  test('P5 what is due comes at once, however many messages were purged that were due before it', async () => {
    const durable = freshDurable()
    await observer.query(`select ${schema}.subscribe($1, $2)`, [durable, `${durable}.>`])
    await bus.pubsub.publishMany(Array.from({ length: 900 }, () => ({ subject: `${durable}.purged`, payload: 'x' })))
    const { seq } = await bus.pubsub.publish(`${durable}.kept`, 'x')
    const { rowCount } = await observer.query(`select from ${schema}.fetch($1, 1000, $2)`, [durable, SHORT_MS])
    expect(rowCount).toBe(901)
    expect(await bus.admin.purgeMessages(`${durable}.purged`)).toBe(900)
    await untilExpired(durable)
    await using stream = await bus.pubsub.subscribe(`${durable}.>`, durable, { ackWaitMs: LONG_MS })
    const message = await new Taker(stream).expect(1_000)
    expect([message.seq, message.attempt]).toEqual([seq, 2])
    expect((await rows(durable)).length).toBe(1)
  })

  test('A5 an ack in an open transaction holds nobody up', async () => {
    await using stage = await held()
    await caller.query('begin')
    await stage.message.ack({ tx: caller })
    expect(await bus.admin.purgeMessages(stage.durable)).toBe(1)
    await caller.query('commit')
    expect(await rows(stage.durable)).toEqual([])
  })

  test('A5 a fetch in an open transaction holds nobody up, and what it was handed may still be settled', async () => {
    await using stage = await held()
    const { durable, message } = stage
    await message.nak()
    await caller.query('begin')
    const { rows: again } = await caller.query(`select seq, token from ${schema}.fetch($1)`, [durable])
    expect(await bus.admin.purgeMessages(durable)).toBe(1)
    await caller.query('commit')
    const [{ seq, token }] = again as [{ seq: string; token: string }]
    const { rows: acked } = await observer.query(`select ${schema}.ack_message($1, $2, $3) as done`, [durable, seq, token])
    expect(acked).toEqual([{ done: true }])
  })

  test('A5 what commits later is not touched, and is delivered', async () => {
    const durable = freshDurable()
    await using stream = await bus.pubsub.subscribe(`${durable}.>`, durable)
    await caller.query('begin')
    await bus.pubsub.publish(`${durable}.late`, 'late', { tx: caller })
    await bus.pubsub.publish(`${durable}.early`, 'early')
    const taker = new Taker(stream)
    await (await taker.expect()).ack()
    expect(await bus.admin.purgeMessages(`${durable}.>`)).toBe(1)
    await caller.query('commit')
    expect((await taker.expect()).subject).toBe(`${durable}.late`)
  })

  test('A5 a log that takes several statements to look through is purged whole, and nothing else of it', async () => {
    const root = freshDurable()
    await bus.pubsub.publishMany(Array.from({ length: 12_000 }, (_, n) => ({ subject: `${root}.${n % 3}`, payload: 'x' })))
    expect(await bus.admin.purgeMessages(`${root}.1`)).toBe(4_000)
    const { rows: left } = await observer.query(
      `select subject, count(*)::int as n from ${schema}.messages where subject like $1 group by subject order by subject`,
      [`${root}.%`],
    )
    expect(left).toEqual([
      { subject: `${root}.0`, n: 4_000 },
      { subject: `${root}.2`, n: 4_000 },
    ])
    const { rows: sum } = await observer.query(`select ${schema}.purge_messages($1) as n`, [`${root}.*`])
    expect(sum).toEqual([{ n: '8000' }])
  })
})

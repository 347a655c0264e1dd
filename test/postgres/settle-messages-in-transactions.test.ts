/** Acks of messages in the caller's transaction, and on dying connections. */

import { describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import {
  bus,
  caller,
  connectionString,
  deadLetters,
  freshDurable,
  held,
  LONG_MS,
  observer,
  other,
  QUIET_MS,
  results,
  rows,
  SHORT_MS,
  schema,
  setTheStage,
  untilAckWaits,
  untilExpired,
} from './support/messages-stage.ts'
import { outcome, Taker, text } from './support/outcome.ts'

setTheStage()

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
    const durable = freshDurable()
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
    const from = freshDurable()
    const to = freshDurable()
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

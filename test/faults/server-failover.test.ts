/**
 * The primary dies and its asynchronous standby takes its place: what had not reached the standby is lost, and lost as a whole. Whoever was
 * told of it before cannot be told otherwise; what can be promised is that nothing of it is left over, that nobody who holds something
 * from it may settle anything, and that everything older goes on.
 */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type ClaimedJob, type Lease, PostgresBus, type PostgresTx } from '../../src/index.ts'
import { findInstalled } from '../postgres/support/installed-postgres.ts'
import { outcome, Taker, text } from '../postgres/support/outcome.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { hasBaseBackup, type Pair, startPair } from './support/server/pair.ts'

const installed = await findInstalled()
const possible = await hasBaseBackup(installed)
const LONG_MS = 600_000

let pair: Pair
beforeAll(async () => {
  if (possible) pair = await startPair(installed as string)
})
afterAll(() => pair?.[Symbol.asyncDispose]())

/** Business row, message with an id, job with a key and a key-value entry, in one transaction. */
async function writeAll(bus: PostgresBus, client: Session, n: number): Promise<void> {
  await client.query('begin')
  await client.query('insert into orders (n) values ($1)', [n])
  await bus.pubsub.publish('orders', `${n}`, { tx: client, msgId: `order-${n}` })
  await bus.jobs.enqueue('orders', { payload: `${n}`, dedupKey: `order-${n}` }, { tx: client })
  await bus.kv.put('orders', `${n}`, `${n}`, { tx: client })
  await client.query('commit')
}

describe.skipIf(!possible)(
  `failover to an asynchronous standby${possible ? '' : ' (skipped: needs an installed Postgres with pg_basebackup)'}`,
  () => {
    test('P1 P4 P7 P9 P12 J1 J5 J6 K1 K5 what is lost is lost whole, what holds something of it may settle nothing, and all else goes on', async () => {
      const { connectionString } = pair
      await using bus = await PostgresBus.connect({ connectionString, pollIntervalMs: 200 })
      const observer = await session(connectionString)
      await observer.query('create table orders (n int primary key)')
      await using stream = await bus.pubsub.subscribe('orders', 'orders', { ackWaitMs: 5_000 })
      const taker = new Taker(stream)
      await (await bus.pubsub.subscribe('orders', 'never-read')).close()
      const seqs = new Map<string, number>()

      const early = 20
      for (let n = 0; n < early; n++) await writeAll(bus, observer, n)
      const acked: string[] = []
      for (let n = 0; n < early / 2; n++) {
        const message = await taker.expect()
        seqs.set(text(message.payload), message.seq)
        await message.ack()
        acked.push(text(message.payload))
      }
      const lease = await bus.kv.lease('leases', 'known', LONG_MS)
      await bus.jobs.enqueue('work', { payload: 'known' })
      await bus.jobs.enqueue('work', { payload: 'tail' })
      const known = (await bus.jobs.claim('work', 'w', LONG_MS))!
      expect(text(known.payload)).toBe('known')
      const revision = await bus.kv.put('settings', 'k', 'known')
      await pair.caughtUp()

      // The standby is cut off in the middle of a stream of commits, wherever that hits.
      let committed = early
      let going = true
      const writing = (async () => {
        await using client = await session(connectionString)
        while (going) await writeAll(bus, client, committed++)
      })()
      await eventually(() => committed > early + 20)
      pair.part()
      const parted = committed
      await eventually(() => committed > parted + 20)
      going = false
      await writing
      const tailLease = await bus.kv.lease('leases', 'tail', LONG_MS)
      const tailJob = (await bus.jobs.claim('work', 'w', LONG_MS))!
      expect(text(tailJob.payload)).toBe('tail')
      await bus.kv.put('settings', 'k', 'tail')
      const lateAck = await taker.expect()
      await lateAck.ack()
      await observer[Symbol.asyncDispose]()

      await pair.failOver()
      await eventually(async () => expect(await outcome(bus.pubsub.publish('elsewhere', 'm'))).toBe('ok'), { timeoutMs: 20_000 })
      await using now = await session(connectionString)
      const column = async (sql: string) => (await now.query<{ n: string }>(sql)).rows.map(({ n }) => Number(n)).sort((a, b) => a - b)
      const kept = await column('select n from orders')
      // A piece of the order of commits from its beginning, and not all of it.
      expect(kept).toEqual(Array.from({ length: kept.length }, (_, n) => n))
      expect(kept.length).toBeGreaterThanOrEqual(early)
      expect(kept.length).toBeLessThan(committed)
      for (const sql of [
        `select convert_from(payload, 'UTF8') as n from klieo.messages where subject = 'orders'`,
        `select substr(msg_id, 7) as n from klieo.message_ids where msg_id like 'order-%'`,
        `select convert_from(payload, 'UTF8') as n from klieo.jobs where queue = 'orders'`,
        `select substr(key, 7) as n from klieo.kv_entries where bucket = 'dedup.orders'`,
        `select key as n from klieo.kv_entries where bucket = 'orders'`,
      ]) {
        expect(await column(sql), sql).toEqual(kept)
      }
      const { rows: orphans } = await now.query(
        'select d.seq from klieo.deliveries d where not exists (select from klieo.messages m where m.tx = d.tx and m.seq = d.seq)',
      )
      expect(orphans).toEqual([])

      await holdersKnowTheirPlace({ bus, lease, known, revision, tailLease, tailJob })

      // Said again, what was lost is stored and what was kept is not.
      const last = kept.length - 1
      expect((await bus.pubsub.publish('orders', `${last}`, { msgId: `order-${last}` })).duplicate).toBe(true)
      expect((await bus.pubsub.publish('orders', `${last + 1}`, { msgId: `order-${last + 1}` })).duplicate).toBe(false)
      const keptJob = await bus.jobs.enqueue('orders', { payload: 'again', dedupKey: `order-${last}` })
      const newJob = await bus.jobs.enqueue('orders', { payload: `${last + 1}`, dedupKey: `order-${last + 1}` })
      expect(Number(newJob)).not.toBe(Number(keptJob))
      const { rows: payloads } = await now.query(`select convert_from(payload, 'UTF8') as payload from klieo.jobs where id = $1`, [keptJob])
      expect(payloads).toEqual([{ payload: `${last}` }])

      // The stream that was open all the time brings what was not acked, and the durable that was never read everything.
      const rest = new Set<string>()
      const wanted = last + 2 - acked.length
      while (rest.size < wanted) {
        const message = await taker.expect(20_000)
        expect(acked).not.toContain(text(message.payload))
        if ((await outcome(message.ack())) === 'ok') rest.add(text(message.payload))
      }
      expect([...rest].map(Number).sort((a, b) => a - b)).toEqual(Array.from({ length: wanted }, (_, n) => acked.length + n))
      await using never = await bus.pubsub.subscribe('orders', 'never-read')
      const all = new Taker(never)
      const came: number[] = []
      while (came.length < last + 2) {
        const message = await all.expect()
        came.push(Number(text(message.payload)))
        await message.ack()
      }
      expect(came.sort((a, b) => a - b)).toEqual(Array.from({ length: last + 2 }, (_, n) => n))
    }, 120_000)
  },
)

interface Holders {
  readonly bus: PostgresBus
  readonly lease: Lease
  readonly known: ClaimedJob<PostgresTx>
  readonly revision: number
  readonly tailLease: Lease
  readonly tailJob: ClaimedJob<PostgresTx>
}

/**
 * Fences and revisions grow beyond those that had reached the standby. Those of the lost tail may be given out again: that no two holders
 * settle the same is up to the tokens, which are random.
 */
async function holdersKnowTheirPlace({ bus, lease, known, revision, tailLease, tailJob }: Holders): Promise<void> {
  await lease.heartbeat()
  await known.heartbeat()
  expect(await outcome(bus.kv.lease('leases', 'known', LONG_MS))).toBe('lease_held')
  await lease.release()
  expect((await bus.kv.lease('leases', 'known', LONG_MS)).fence).toBeGreaterThan(lease.fence)
  await known.ack()

  expect(await outcome(tailLease.heartbeat())).toBe('lease_lost')
  const next = await bus.kv.lease('leases', 'tail', LONG_MS)
  expect(next.fence).toBeGreaterThan(lease.fence)
  await tailLease.release()
  await next.heartbeat()
  const again = (await bus.jobs.claim('work', 'w', LONG_MS))!
  expect([text(again.payload), again.attempt]).toEqual(['tail', 1])
  for (const settle of [tailJob.heartbeat, tailJob.nak, tailJob.ack]) expect(await outcome(settle.call(tailJob))).toBe('lease_lost')
  expect(await outcome(again.ack())).toBe('ok')

  expect(text((await bus.kv.get('settings', 'k'))!.value)).toBe('known')
  expect(await bus.kv.cas('settings', 'k', 'next', revision)).toBeGreaterThan(revision)
}

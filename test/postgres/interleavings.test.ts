/** Races written out as the steps of several sessions, each held exactly where it hurts. */

import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { BusError, type ClaimedJob, type Msg, type MsgStream, PostgresBus, type PostgresTx } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session, untilBlocked } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
let bus: PostgresBus
let observer: Session

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false, pollIntervalMs: 50 })
  observer = await session(connectionString)
})

afterAll(async () => {
  await bus.close()
  await observer.query(`drop schema ${schema} cascade`)
  await observer[Symbol.asyncDispose]()
})

let names = 0
function fresh(): string {
  return `race${++names}`
}

function connect(): Promise<PostgresBus> {
  return PostgresBus.connect({ connectionString, schema, maintenance: false, pollIntervalMs: 50 })
}

async function code(promise: Promise<unknown>): Promise<string> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  )
  if (error === undefined) return 'resolved'
  expect(error).toBeInstanceOf(BusError)
  return (error as BusError).code
}

/** The next message, or a failure: never a wait without end. */
async function next(stream: MsgStream<PostgresTx>, withinMs = 5_000): Promise<Msg<PostgresTx>> {
  const late = Promise.withResolvers<never>()
  const timer = setTimeout(() => late.reject(new Error(`no message within ${withinMs} ms`)), withinMs)
  try {
    const { value } = await Promise.race([stream[Symbol.asyncIterator]().next(), late.promise])
    if (!value) throw new Error('the stream ended')
    return value
  } finally {
    clearTimeout(timer)
  }
}

async function consumerOf(durable: string): Promise<number> {
  const { rows } = await observer.query<{ id: number }>(`select id from ${schema}.consumer_offsets where durable = $1`, [durable])
  return rows[0]!.id
}

/** Resolves when the delivery's or lease's time is over, by the database clock. */
async function untilDue(table: 'deliveries' | 'jobs', where: string, values: unknown[]): Promise<void> {
  await eventually(
    async () => {
      const { rows } = await observer.query(`select from ${schema}.${table} where ${where} and visible_at <= clock_timestamp()`, values)
      return rows.length === 1
    },
    { what: `a row of ${table} to be due` },
  )
}

/** The backends that wait for `holder`, directly or in a queue behind one another. */
async function waitersOf(holder: Session): Promise<number[]> {
  const { rows } = await observer.query<{ pid: number }>(
    `with recursive waiting(pid) as (
       select pid from pg_stat_activity where $1 = any(pg_blocking_pids(pid))
       union
       select a.pid from pg_stat_activity a join waiting w on w.pid = any(pg_blocking_pids(a.pid))
     )
     select pid from waiting`,
    [holder.pid],
  )
  return rows.map(({ pid }) => pid)
}

/** Resolves when so many wait for `holder`, or when `call` is over: whether a call waits is sometimes its own affair. */
async function untilWaitersOf(holder: Session, count: number, call?: Promise<unknown>): Promise<void> {
  let over = false
  const end = () => {
    over = true
  }
  call?.then(end, end)
  await eventually(async () => over || (await waitersOf(holder)).length >= count, { what: `${count} waiting for backend ${holder.pid}` })
}

const FETCH = `select seq::int as seq, attempt from ${schema}.fetch_messages($1, 10, 30000, 1000, null, 1000000) where seq is not null`

describe('settling while somebody else is being given the message', () => {
  /** What was yielded stays with its holder when the stream closes, and the stream cannot fetch it again. */
  async function expired(ackWaitMs = 100): Promise<{ msg: Msg<PostgresTx>; consumer: number }> {
    const subject = fresh()
    const stream = await bus.pubsub.subscribe(subject, subject, { ackWaitMs })
    await bus.pubsub.publish(subject, 'x')
    const msg = await next(stream)
    await stream.close()
    const consumer = await consumerOf(subject)
    await untilDue('deliveries', 'consumer_id = $1', [consumer])
    return { msg, consumer }
  }

  test('P7 an ack that waits for a redelivery under way is refused once that commits, and changes nothing', async () => {
    const { msg, consumer } = await expired()
    await using rival = await session(connectionString)
    await rival.query('begin isolation level read committed')
    expect((await rival.query(FETCH, [consumer])).rows).toEqual([{ seq: msg.seq, attempt: msg.attempt + 1 }])
    const ack = code(msg.ack())
    await untilWaitersOf(rival, 1)
    await rival.query('commit')
    expect(await ack).toBe('lease_lost')
    const { rows } = await observer.query(`select attempt from ${schema}.deliveries where consumer_id = $1`, [consumer])
    expect(rows).toEqual([{ attempt: msg.attempt + 1 }])
  })

  test('P7 an ack that waits for a redelivery that is rolled back succeeds, and the message never comes again', async () => {
    const { msg, consumer } = await expired()
    await using rival = await session(connectionString)
    await rival.query('begin isolation level read committed')
    await rival.query(FETCH, [consumer])
    const ack = code(msg.ack())
    await untilWaitersOf(rival, 1)
    await rival.query('rollback')
    expect(await ack).toBe('resolved')
    expect((await rival.query(FETCH, [consumer])).rows).toEqual([])
  })

  /**
   * The holder asks for more time, then settles, and the connection of whatever waits for the rival is cut: its client
   * cannot know what became of it. Resolves when the settlement waits again, or has given up.
   */
  async function loseTheAnswer(rival: Session, extend: (() => Promise<void>) | undefined, settle: () => Promise<void>) {
    if (extend) await untilWaitersOf(rival, 1, code(extend()))
    const before = (await waitersOf(rival)).length
    const settled = code(settle())
    await untilWaitersOf(rival, before + 1)
    await observer.query('select pg_terminate_backend(pid) from unnest($1::int[]) as pid', [await waitersOf(rival)])
    await untilWaitersOf(rival, 1, settled)
    return { settled }
  }

  test('P7 an ack whose answer was lost is no success when the message was given on meanwhile, an extend in that moment notwithstanding', async () => {
    const { msg, consumer } = await expired(1_500)
    await using rival = await session(connectionString)
    await rival.query('begin isolation level read committed')
    expect((await rival.query(FETCH, [consumer])).rows).toEqual([{ seq: msg.seq, attempt: 2 }])
    const { settled } = await loseTheAnswer(
      rival,
      () => msg.extend(),
      () => msg.ack(),
    )
    await rival.query('commit')
    expect(['lease_lost', 'connection']).toContain(await settled)
  })

  test('J6 an ack whose answer was lost is no success when the job was claimed meanwhile, a heartbeat in that moment notwithstanding', async () => {
    const queue = fresh()
    await bus.jobs.enqueue(queue, { payload: 'x' })
    const job = (await bus.jobs.claim(queue, 'old', 1_500)) as ClaimedJob<PostgresTx>
    await untilDue('jobs', 'id = $1', [job.id])
    await using rival = await session(connectionString)
    await rival.query('begin isolation level read committed')
    await rival.query(`select id from ${schema}.claim_jobs($1, 'new', 30000, 1)`, [queue])
    const { settled } = await loseTheAnswer(
      rival,
      () => job.heartbeat(),
      () => job.ack(),
    )
    await rival.query('commit')
    expect(['lease_lost', 'connection']).toContain(await settled)
  })

  test('J6 a heartbeat that came before the claim, a lost answer and a claim after the lease still end in a refusal', async () => {
    const queue = fresh()
    await bus.jobs.enqueue(queue, { payload: 'x' })
    const job = (await bus.jobs.claim(queue, 'old', 200)) as ClaimedJob<PostgresTx>
    await job.heartbeat()
    await untilDue('jobs', 'id = $1', [job.id])
    await using rival = await session(connectionString)
    await rival.query('begin isolation level read committed')
    await rival.query(`select id from ${schema}.claim_jobs($1, 'new', 30000, 1)`, [queue])
    const { settled } = await loseTheAnswer(rival, undefined, () => job.ack())
    await rival.query('commit')
    expect(['lease_lost', 'connection']).toContain(await settled)
  })

  test('J6 a heartbeat that the server meets after an ack in an open transaction waits for nothing, whatever the holder knew', async () => {
    const queue = fresh()
    await bus.jobs.enqueue(queue, { payload: 'x' })
    const job = (await bus.jobs.claim(queue, 'w', 30_000)) as ClaimedJob<PostgresTx>
    await using tx = await session(connectionString)
    await using beating = await session(connectionString)
    await tx.query('begin')
    const { rows } = await observer.query<{ token: string }>(`select token from ${schema}.jobs where id = $1`, [job.id])
    await job.ack({ tx })
    // What a heartbeat sends that was under way already when the ack was called.
    await beating.query(`set lock_timeout = '2s'`)
    const beat = beating.query(`select until from ${schema}.heartbeat_job($1, $2, 30000)`, [job.id, rows[0]!.token])
    expect((await beat).rows[0].until).not.toBeNull()
    await tx.query('commit')
  })

  test('J6 a heartbeat while an ack is in an open transaction is granted although it waits for nothing', async () => {
    const queue = fresh()
    await bus.jobs.enqueue(queue, { payload: 'x' })
    const job = (await bus.jobs.claim(queue, 'old', 30_000)) as ClaimedJob<PostgresTx>
    await using tx = await session(connectionString)
    await tx.query('begin')
    await job.ack({ tx })
    expect(await code(job.heartbeat())).toBe('resolved')
    await tx.query('rollback')
  })
})

describe('pruning', () => {
  test('P13 a durable that is made while messages are being pruned loses none that it was handed', async () => {
    // Alone in its schema: every other durable would keep the messages from being pruned.
    const own = freshSchema()
    await using lonely = await PostgresBus.connect({ connectionString, schema: own, maintenance: false, pollIntervalMs: 50 })
    const { seq } = await lonely.pubsub.publish('s', 'old')
    await using holder = await session(connectionString)
    await using pruner = await session(connectionString)
    // The pruner has chosen its rows and waits for this one.
    await holder.query('begin')
    await holder.query(`select from ${own}.messages where seq = $1 for share`, [seq])
    let pruned: Promise<unknown> = Promise.resolve()
    await eventually(
      async () => {
        // Not at once where somebody else's older transaction is open on the server.
        pruned = pruner.query(`select ${own}.prune_messages(0, 100000)`)
        await untilWaitersOf(holder, 1, pruned)
        return (await waitersOf(holder)).length === 1
      },
      { timeoutMs: 20_000 },
    )
    // Whether the durable waits for the pruner, or the other way round, or gets nothing old: what it is handed stays.
    const handed = lonely.pubsub.subscribe('s', 'd', { start: 'all' }).then(async (stream) => ({ stream, msg: await next(stream) }))
    await untilWaitersOf(holder, 2, handed)
    await holder.query('commit')
    await pruned
    await lonely.pubsub.publish('s', 'new')
    const { stream, msg } = await handed
    await msg.nak()
    const again = await next(stream)
    expect([again.seq, again.attempt]).toEqual([msg.seq, 2])
    await observer.query(`drop schema ${own} cascade`)
  })
})

describe('a long transaction', () => {
  test('K6 a change whose transaction was open for longer than changes are kept reaches the watch, whenever pruning comes by', async () => {
    const bucket = fresh()
    // It looks only when it is rung: what SQL writes rings nobody.
    await using patient = await PostgresBus.connect({ connectionString, schema, maintenance: false, pollIntervalMs: 60_000 })
    const watch = await patient.kv.watch(bucket)
    const changes = watch[Symbol.asyncIterator]()
    await bus.kv.put(bucket, 'first', 'x')
    expect((await changes.next()).value).toMatchObject({ operation: 'put', entry: { key: 'first' } })
    await using slow = await session(connectionString)
    await slow.query('begin')
    await slow.query(`select ${schema}.kv_put($1, 'slow', 'x')`, [bucket])
    await observer.query(`select ${schema}.prune_kv(1000)`)
    // As if eleven minutes had passed since.
    await slow.query(`update ${schema}.kv_changes set changed_at = changed_at - interval '11 minutes'`)
    await observer.query(`update ${schema}.kv_horizons set at = at - interval '11 minutes'`)
    await slow.query('commit')
    await observer.query(`select ${schema}.prune_kv(1000)`)
    await bus.kv.put(bucket, 'last', 'x')
    expect((await changes.next()).value).toMatchObject({ operation: 'put', entry: { key: 'slow' } })
    await watch.close()
  })

  test('P9 a fetch reads nothing of what an open transaction has published so far', async () => {
    const own = freshSchema()
    await using lonely = await PostgresBus.connect({ connectionString, schema: own, maintenance: false })
    const stream = await lonely.pubsub.subscribe('s', 'd')
    await using bulk = await session(connectionString)
    await bulk.query('begin')
    await bulk.query(`insert into ${own}.messages (subject, payload) select 's', 'x' from generate_series(1, 20000)`)
    await lonely.pubsub.publish('s', 'x')
    await (await next(stream)).ack()
    await stream.close()
    await using reader = await session(connectionString)
    await reader.query('begin isolation level read committed')
    await reader.query(`select from ${own}.consumer_offsets o, ${own}.fetch_messages(o.id, 10, 30000, 1000, null, 1000000)`)
    const { rows } = await reader.query(`select pg_stat_get_xact_tuples_returned('${own}.messages_pkey'::regclass)::int as read`)
    await reader.query('commit')
    expect((rows[0] as { read: number }).read).toBeLessThan(100)
    await bulk.query('rollback')
    await observer.query(`drop schema ${own} cascade`)
  })
})

describe('connecting', () => {
  test('P9 what commits while a process looks whether the log was restored does not look like another cluster', async () => {
    await using holder = await session(connectionString)
    await using looker = await session(connectionString)
    await holder.query('begin')
    await holder.query(`lock table ${schema}.consumer_offsets in access exclusive mode`)
    const looked = looker.query<{ restored: boolean }>(`select ${schema}.restored()`)
    await untilBlocked(observer, looker.pid)
    for (let n = 0; n < 3; n++) await bus.pubsub.publish(fresh(), 'x')
    await holder.query('commit')
    expect((await looked).rows[0]!.restored).toBe(false)
  })

  test('P9 a process connects while a publishing transaction is open, and nobody waits for it', async () => {
    await using tx = await session(connectionString)
    await tx.query('begin')
    await bus.pubsub.publish(fresh(), 'x', { tx })
    await using second = await connect()
    const subject = fresh()
    await second.pubsub.publish(subject, 'y')
    expect((await next(await second.pubsub.subscribe(subject, subject))).seq).toBeGreaterThan(0)
    await tx.query('rollback')
  })
})

describe('a lost connection', () => {
  test('P1 after it, a publish in a transaction that holds the last connection of the pool waits for no other', async () => {
    const pool = new pg.Pool({ connectionString, max: 1, application_name: 'the only one' })
    pool.on('error', () => {})
    await using small = await PostgresBus.connect({ pool, schema, maintenance: false })
    const subject = fresh()
    await small.pubsub.publish(subject, '1')
    await eventually(async () => {
      await observer.query(
        `select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'the only one' and query not like 'listen%'`,
      )
      return pool.totalCount === 0
    })
    const tx = await pool.connect()
    await tx.query('begin')
    const late = Promise.withResolvers<string>()
    const timer = setTimeout(() => late.resolve('late'), 5_000)
    expect(await Promise.race([code(small.pubsub.publish(subject, '2', { tx })), late.promise])).toBe('resolved')
    clearTimeout(timer)
    await tx.query('commit')
    tx.release()
    const stream = await bus.pubsub.subscribe(subject, subject)
    expect([(await next(stream)).payload, (await next(stream)).payload].map((bytes) => new TextDecoder().decode(bytes))).toEqual(['1', '2'])
    await small.close()
    await pool.end()
  })
})

describe('closing with a call under way', () => {
  test('J7 a job whose claim was under way when the bus closed is claimable at once', async () => {
    const closing = await connect()
    const queue = fresh()
    const id = await bus.jobs.enqueue(queue, { payload: 'x' })
    await using holder = await session(connectionString)
    await holder.query('begin')
    await holder.query(`lock table ${schema}.jobs in access exclusive mode`)
    const claim = code(closing.jobs.claim(queue, 'leaving', 30_000))
    await untilWaitersOf(holder, 1)
    const closed = closing.close()
    await holder.query('commit')
    await closed
    await claim
    const job = await bus.jobs.claim(queue, 'next', 30_000, { waitMs: 2_000 })
    expect(job?.id).toBe(id)
    await job?.ack()
  })

  test('P10 messages whose fetch was under way when the bus closed come at once, the attempt not counted', async () => {
    const closing = await connect()
    const subject = fresh()
    const stream = await closing.pubsub.subscribe(subject, subject, { ackWaitMs: 30_000 })
    const consumer = await consumerOf(subject)
    await using holder = await session(connectionString)
    await holder.query('begin')
    await holder.query(`select from ${schema}.consumer_offsets where id = $1 for update`, [consumer])
    await bus.pubsub.publishMany([1, 2, 3].map((n) => ({ subject, payload: String(n) })))
    const asked = stream[Symbol.asyncIterator]().next()
    await untilWaitersOf(holder, 1)
    const closed = closing.close()
    await holder.query('commit')
    await closed
    expect((await asked).done).toBe(true)
    const heir = await bus.pubsub.subscribe(subject, subject)
    const texts: string[] = []
    for (let n = 0; n < 3; n++) {
      const msg = await next(heir)
      expect(msg.attempt).toBe(1)
      texts.push(new TextDecoder().decode(msg.payload))
      await msg.ack()
    }
    expect(texts).toEqual(['1', '2', '3'])
    await heir.close()
  })

  test('K5 a lease whose grant was under way when the bus closed is free at once', async () => {
    const closing = await connect()
    const key = fresh()
    await using holder = await session(connectionString)
    await holder.query('begin')
    await holder.query(`lock table ${schema}.kv_leases in access exclusive mode`)
    const grant = code(closing.kv.lease('b', key, 30_000))
    await untilWaitersOf(holder, 1)
    const closed = closing.close()
    await holder.query('commit')
    await closed
    await grant
    const lease = await bus.kv.lease('b', key, 30_000, { waitMs: 2_000 })
    await lease.release()
  })
})

describe('handing back', () => {
  test('P8 what a closing stream hands back keeps its order, at attempt 1', async () => {
    const subject = fresh()
    const first = await connect()
    const stream = await first.pubsub.subscribe(subject, subject)
    for (let n = 0; n < 60; n++) await bus.pubsub.publish(subject, String(n))
    // The first batches double; a good part of the sixty is fetched ahead by now.
    for (let n = 0; n < 20; n++) await (await next(stream)).ack()
    await stream.close()
    await first.close()
    const heir = await bus.pubsub.subscribe(subject, subject)
    const got: number[] = []
    for (let n = 20; n < 60; n++) {
      const msg = await next(heir)
      expect(msg.attempt).toBe(1)
      got.push(Number(new TextDecoder().decode(msg.payload)))
      await msg.ack()
    }
    expect(got).toEqual(Array.from({ length: 40 }, (_, n) => n + 20))
    await heir.close()
  })
})

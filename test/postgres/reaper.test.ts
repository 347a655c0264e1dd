/** Burying what nobody settled: by several reapers and claimers at once, by none, and by one that dies over it. */

import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { startChild } from '../support/child.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { Taker } from './support/outcome.ts'

const connectionString = databaseUrl()
const MANY = 1_000

let schema: string
let bus: PostgresBus
let observer: Session

beforeAll(async () => {
  observer = await session(connectionString)
})

/** A schema for each test: a reaper takes whatever it finds. */
beforeEach(async () => {
  schema = freshSchema()
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false, pollIntervalMs: 100 })
  return async () => {
    await bus.close()
    await observer.query(`drop schema ${schema} cascade`)
  }
})

afterAll(async () => {
  await observer[Symbol.asyncDispose]()
})

/** Jobs of the queue whose last lease has run out. */
async function exhaustedJobs(queue: string, many: number): Promise<string[]> {
  const ids = await bus.jobs.enqueueMany(
    queue,
    Array.from({ length: many }, () => ({ payload: 'p', maxAttempts: 1 })),
  )
  const { rowCount } = await observer.query(`select from ${schema}.claim_jobs($1, 'dead worker', 1, $2)`, [queue, many])
  expect(rowCount).toBe(many)
  await eventually(async () => {
    const { rows } = await observer.query(`select bool_and(visible_at < clock_timestamp()) as over from ${schema}.jobs`)
    return (rows[0] as { over: boolean }).over
  })
  return ids
}

/** Messages of a durable whose last ack wait has run out. */
async function exhaustedDeliveries(durable: string, many: number): Promise<number[]> {
  const stream = await bus.pubsub.subscribe(durable, durable)
  await stream.close()
  const sent = await bus.pubsub.publishMany(Array.from({ length: many }, () => ({ subject: durable, payload: 'p' })))
  const { rowCount } = await observer.query(
    `select from ${schema}.consumer_offsets o, ${schema}.fetch_messages(o.id, $2, 1, $2 + 1, 1, 100000000) f where o.durable = $1 and f.seq is not null`,
    [durable, many],
  )
  expect(rowCount).toBe(many)
  await eventually(async () => {
    const { rows } = await observer.query(`select bool_and(visible_at < clock_timestamp()) as over from ${schema}.deliveries`)
    return (rows[0] as { over: boolean }).over
  })
  return sent.map(({ seq }) => seq)
}

/** What the dead letters on the subject say they were, in order. */
async function dead(subject: string, header: 'dlq_job_id' | 'dlq_seq'): Promise<string[]> {
  const { rows } = await observer.query(`select headers ->> $2 as id from ${schema}.messages where subject = $1`, [subject, header])
  return (rows as { id: string }[]).map(({ id }) => id).sort((a, b) => Number(a) - Number(b))
}

async function sessions(many: number): Promise<Session[]> {
  return Promise.all(Array.from({ length: many }, () => session(connectionString)))
}

describe('a thousand jobs without an attempt left', () => {
  test('J4 two reapers and four claimers at once bury each exactly once and hand none out', async () => {
    const ids = await exhaustedJobs('q', MANY)
    const clients = await sessions(6)
    try {
      const work = clients.map(async (client, n) => {
        for (;;) {
          if (n < 2) {
            const { rows } = await client.query(`select coalesce(sum(count), 0)::int as n from ${schema}.reap_jobs(37)`)
            if ((rows[0] as { n: number }).n === 0) return
          } else {
            expect((await client.query(`select from ${schema}.claim_jobs('q', 'w', 1000, 10)`)).rowCount).toBe(0)
            return
          }
        }
      })
      await Promise.all(work)
      await observer.query(`select ${schema}.reap_jobs(100000)`)
    } finally {
      await Promise.all(clients.map((client) => client[Symbol.asyncDispose]()))
    }
    expect(await dead('q.dlq', 'dlq_job_id')).toEqual(ids.toSorted((a, b) => Number(a) - Number(b)))
    const { rows } = await observer.query(`select dead::int, ready::int, running::int from ${schema}.queue_stats where queue = 'q'`)
    expect(rows).toEqual([{ dead: MANY, ready: 0, running: 0 }])
  })

  test('J3 and J4 with no reaper a claim buries them, and hands out what is ready beside them', async () => {
    const ids = await exhaustedJobs('q', MANY)
    const fresh = await bus.jobs.enqueue('q', { payload: 'fresh' })
    const job = await bus.jobs.claim('q', 'w', 60_000)
    expect(job?.id).toBe(fresh)
    expect(await bus.jobs.claim('q', 'w', 60_000)).toBeNull()
    expect(await dead('q.dlq', 'dlq_job_id')).toEqual(ids.toSorted((a, b) => Number(a) - Number(b)))
  })

  test('J4 a reaper whose connection dies in the middle buries none; the next buries all, each once', async () => {
    const ids = await exhaustedJobs('q', 200)
    await using dying = await session(connectionString)
    await dying.query('begin')
    const { rows } = await dying.query(`select count from ${schema}.reap_jobs(120)`)
    expect(rows).toEqual([{ count: 120 }])
    // Others pass over what it holds and bury the rest.
    expect((await observer.query(`select count from ${schema}.reap_jobs(1000)`)).rows).toEqual([{ count: 80 }])
    await observer.query('select pg_terminate_backend($1)', [dying.pid])
    await eventually(async () => (await observer.query('select from pg_stat_activity where pid = $1', [dying.pid])).rowCount === 0)
    expect(await dead('q.dlq', 'dlq_job_id')).toHaveLength(80)
    expect((await observer.query(`select count from ${schema}.reap_jobs(1000)`)).rows).toEqual([{ count: 120 }])
    expect(await dead('q.dlq', 'dlq_job_id')).toEqual(ids.toSorted((a, b) => Number(a) - Number(b)))
  })
})

describe('a thousand messages at their last delivery', () => {
  test('P6 two reapers and a member at once bury each exactly once and hand none out', async () => {
    const seqs = await exhaustedDeliveries('d', MANY)
    const clients = await sessions(2)
    try {
      await using stream = await bus.pubsub.subscribe('d', 'd', { maxDeliver: 1 })
      const member = new Taker(stream).take(1_000)
      await Promise.all(
        clients.map(async (client) => {
          for (;;) {
            const { rows } = await client.query(`select coalesce(sum(count), 0)::int as n from ${schema}.reap_deliveries(37)`)
            if ((rows[0] as { n: number }).n === 0) return
          }
        }),
      )
      expect(await member).toBeNull()
    } finally {
      await Promise.all(clients.map((client) => client[Symbol.asyncDispose]()))
    }
    expect(await dead('d.dlq', 'dlq_seq')).toEqual(seqs.map(String))
    expect((await observer.query(`select from ${schema}.deliveries`)).rowCount).toBe(0)
  })

  test('P6 with no reaper a member that fetches buries them', async () => {
    const seqs = await exhaustedDeliveries('d', 100)
    await using stream = await bus.pubsub.subscribe('d', 'd', { maxDeliver: 1 })
    const member = new Taker(stream)
    const fresh = await bus.pubsub.publish('d', 'fresh')
    expect((await member.expect()).seq).toBe(fresh.seq)
    await eventually(async () => expect(await dead('d.dlq', 'dlq_seq')).toEqual(seqs.map(String)))
  })

  test('P6 a reaper whose connection dies in the middle buries none; the next buries all, each once', async () => {
    const seqs = await exhaustedDeliveries('d', 100)
    await using dying = await session(connectionString)
    await dying.query('begin')
    expect((await dying.query(`select count from ${schema}.reap_deliveries(60)`)).rows).toEqual([{ count: 60 }])
    await observer.query('select pg_terminate_backend($1)', [dying.pid])
    await eventually(async () => (await observer.query('select from pg_stat_activity where pid = $1', [dying.pid])).rowCount === 0)
    expect(await dead('d.dlq', 'dlq_seq')).toEqual([])
    expect((await observer.query(`select count from ${schema}.reap_deliveries(1000)`)).rows).toEqual([{ count: 100 }])
    expect(await dead('d.dlq', 'dlq_seq')).toEqual(seqs.map(String))
  })
})

describe('the elected process', () => {
  test('J4 it is killed over a batch: nothing is lost or doubled, and another takes its place', async () => {
    const ids = await exhaustedJobs('q', 50)
    // Dead letters cannot be written meanwhile: whoever reaps stands in the middle of its batch.
    await using blocker = await session(connectionString)
    await blocker.query('begin')
    await blocker.query(`lock table ${schema}.messages in share mode`)
    await using elected = startChild(new URL('./support/bus-child.ts', import.meta.url), { args: [connectionString, schema] })
    await elected.next(({ ready }) => ready === true)
    await eventually(
      async () =>
        (await observer.query('select from pg_stat_activity where $1 = any(pg_blocking_pids(pid))', [blocker.pid])).rowCount === 1,
      { what: 'the reaper in the middle of its batch' },
    )
    await elected.kill('SIGKILL')
    await using _successor = await PostgresBus.connect({ connectionString, schema })
    await blocker.query('commit')
    // The lease of the dead one lasts at most 15 s more.
    await eventually(async () => expect(await dead('q.dlq', 'dlq_job_id')).toEqual(ids.toSorted((a, b) => Number(a) - Number(b))), {
      timeoutMs: 25_000,
    })
    const { rows } = await observer.query(`select dead::int from ${schema}.queue_stats where queue = 'q'`)
    expect(rows).toEqual([{ dead: 50 }])
  })

  test('J4 and P6 it buries by itself, within seconds, and who subscribes to the dead letters is woken', async () => {
    await exhaustedJobs('q', 3)
    await exhaustedDeliveries('d', 3)
    await using letters = await bus.pubsub.subscribe('*.dlq', 'letters')
    const taker = new Taker(letters)
    await using _reaper = await PostgresBus.connect({ connectionString, schema })
    const subjects = []
    while (subjects.length < 6) subjects.push((await taker.expect(5_000)).subject)
    expect(subjects.sort()).toEqual(['d.dlq', 'd.dlq', 'd.dlq', 'q.dlq', 'q.dlq', 'q.dlq'])
  })

  test('P14 a dead letter of a job that a claim buried wakes who waits for it: nobody waits for the poll', async () => {
    await using waiting = await PostgresBus.connect({ connectionString, schema, maintenance: false, pollIntervalMs: 20_000 })
    await using letters = await waiting.pubsub.subscribe('q.dlq', 'letters')
    const letter = new Taker(letters).take(8_000)
    const [id] = await exhaustedJobs('q', 1)
    expect(await bus.jobs.claim('q', 'w', 60_000)).toBeNull()
    expect((await letter)?.headers.dlq_job_id).toBe(id)
  })
})

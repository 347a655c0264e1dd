/** Workers that have nothing but SQL: claim, heartbeat, ack, nak, release and dead_letter, beside one another and beside the package's. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { BusError, PostgresBus, Worker } from '../../src/index.ts'
import { channelOf } from '../../src/postgres/schema-name.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

const schema = freshSchema()
const LONG_MS = 60_000

interface Claim {
  readonly id: string
  readonly payload: Buffer
  readonly headers: Readonly<Record<string, string>>
  readonly attempt: number
  readonly max_attempts: number
  readonly fence: number
  readonly token: string
  readonly leased_until: Date
}

let bus: PostgresBus
/** Two foreign workers. */
let one: Session
let two: Session

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema, maintenance: false })
  ;[one, two] = [await session(databaseUrl()), await session(databaseUrl())]
  await one.query(`create table ${schema}.results (job bigint not null)`)
})

afterAll(async () => {
  await bus.close()
  await Promise.all([one, two].map((client) => client[Symbol.asyncDispose]()))
})

let queues = 0
const freshQueue = () => `q${++queues}`

async function rows<R>(client: Session, text: string, values: readonly unknown[] = []): Promise<R[]> {
  return (await client.query(text.replaceAll('klieo.', `${schema}.`), [...values])).rows as R[]
}

/** The only value of the only row. */
async function value<T>(client: Session, text: string, values: readonly unknown[] = []): Promise<T> {
  return Object.values((await rows<Record<string, T>>(client, text, values))[0] as Record<string, T>)[0] as T
}

const enqueue = (queue: string, more = '') => value<string>(one, `select klieo.enqueue($1, 'p'${more})`, [queue])
const claim = async (client: Session, queue: string, ttlMs = LONG_MS) =>
  (await rows<Claim>(client, `select * from klieo.claim($1, 'foreign', $2)`, [queue, ttlMs]))[0] as Claim
/** Once there is one to claim. */
const eventuallyClaimed = async (client: Session, queue: string, ttlMs = LONG_MS) =>
  (await eventually(async () => (await claim(client, queue, ttlMs)) ?? false, { what: 'a claimable job' })) as Claim
const ack = (client: Session, job: Claim) => value<boolean>(client, 'select klieo.ack($1, $2)', [job.id, job.token])
const nak = (client: Session, job: Claim, delayMs: number | null = null, error: string | null = null) =>
  value<boolean>(client, 'select klieo.nak($1, $2, $3, $4)', [job.id, job.token, delayMs, error])
const heartbeat = (client: Session, job: Claim, ttlMs: number) =>
  value<Date | null>(client, 'select klieo.heartbeat($1, $2, $3)', [job.id, job.token, ttlMs])
const release = (client: Session, job: Claim) => value<boolean>(client, 'select klieo.release($1, $2)', [job.id, job.token])
const deadLetter = (client: Session, job: Claim, reason: string) =>
  value<boolean>(client, 'select klieo.dead_letter($1, $2, $3)', [job.id, job.token, reason])
const stored = (queue: string) => rows(one, 'select * from klieo.jobs where queue = $1 order by id', [queue])
const letters = (queue: string) =>
  rows<{ headers: Record<string, string>; payload_text: string }>(
    one,
    'select headers, payload_text from klieo.message_details where subject = $1 order by seq',
    [`${queue}.dlq`],
  )

async function stateOf(client: Session, text: string): Promise<string | undefined> {
  try {
    await rows(client, text)
    return undefined
  } catch (error) {
    return (error as { code?: string }).code
  }
}

describe('claiming', () => {
  test('J2 four sessions that claim at once are given each job once', async () => {
    const queue = freshQueue()
    await bus.jobs.enqueueMany(queue, Array(200).fill({ payload: 'p' }))
    const sessions = [one, two, await session(databaseUrl()), await session(databaseUrl())]
    const claimed = await Promise.all(
      sessions.map(async (client) => {
        const ids: string[] = []
        for (;;) {
          const jobs = await rows<Claim>(client, `select * from klieo.claim($1, 'foreign', max_jobs => 7)`, [queue])
          if (jobs.length === 0) return ids
          ids.push(...jobs.map(({ id }) => id))
        }
      }),
    )
    await Promise.all(sessions.slice(2).map((client) => client[Symbol.asyncDispose]()))
    expect(claimed.flat()).toHaveLength(200)
    expect(new Set(claimed.flat()).size).toBe(200)
  })

  test('J8 the highest priority comes first; a claim tells what a handler needs', async () => {
    const queue = freshQueue()
    await enqueue(queue)
    const id = await enqueue(queue, `, '{"h": "v"}', priority => 7, max_attempts => 3`)
    const job = await claim(two, queue)
    expect(job).toMatchObject({ id, headers: { h: 'v' }, attempt: 1, max_attempts: 3, fence: 1 })
    expect(job.payload.toString()).toBe('p')
    expect(job.leased_until.getTime()).toBeGreaterThan(Date.now() + LONG_MS / 2)
    expect(await rows(one, 'select state, worker_id from klieo.job_details where id = $1', [id])).toEqual([
      { state: 'running', worker_id: 'foreign' },
    ])
  })

  test('J7 it is refused with KB002 in a transaction that has written, and with KB003 beyond READ COMMITTED', async () => {
    const queue = freshQueue()
    const id = await enqueue(queue)
    await one.query('begin')
    await rows(one, 'insert into klieo.results values (1)')
    expect(await stateOf(one, `select * from klieo.claim('${queue}', 'foreign')`)).toBe('KB002')
    await one.query('rollback')
    await one.query('begin isolation level repeatable read')
    expect(await stateOf(one, `select * from klieo.claim('${queue}', 'foreign')`)).toBe('KB003')
    await one.query('rollback')
    expect((await claim(one, queue)).id).toBe(id)
  })
})

describe('fencing', () => {
  test('J6 once the job is claimed again every settlement of the older claim answers false, or null, and changes nothing', async () => {
    const queue = freshQueue()
    await enqueue(queue)
    const first = await claim(one, queue, 0)
    const second = await claim(two, queue)
    expect(second).toMatchObject({ id: first.id, attempt: 2, fence: 2 })
    expect(second.token).not.toBe(first.token)
    const before = await stored(queue)
    expect(await heartbeat(one, first, LONG_MS)).toBeNull()
    expect(await nak(one, first, 0, 'late')).toBe(false)
    expect(await nak(one, first)).toBe(false)
    expect(await release(one, first)).toBe(false)
    expect(await deadLetter(one, first, 'late')).toBe(false)
    expect(await ack(one, first)).toBe(false)
    expect(await stored(queue)).toEqual(before)
    expect(await letters(queue)).toEqual([])
    expect(await ack(two, second)).toBe(true)
    expect(await stored(queue)).toEqual([])
    expect(await ack(two, second)).toBe(false)
  })

  test('J6 what has run out and was not claimed again can still be extended and settled', async () => {
    const queue = freshQueue()
    await enqueue(queue)
    const job = await claim(one, queue, 0)
    expect((await heartbeat(one, job, LONG_MS))?.getTime()).toBeGreaterThan(Date.now() + LONG_MS / 2)
    expect(await claim(two, queue)).toBeUndefined()
    expect(await nak(one, job, 0)).toBe(true)
    const again = await claim(one, queue, 0)
    expect(await ack(one, again)).toBe(true)
  })

  test('J6 a heartbeat never shortens a lease', async () => {
    const queue = freshQueue()
    await enqueue(queue)
    const job = await claim(one, queue, 1_000)
    const until = await heartbeat(one, job, LONG_MS)
    expect(until!.getTime()).toBeGreaterThan(job.leased_until.getTime())
    expect(await heartbeat(one, job, 0)).toEqual(until)
  })

  test('J6 a heartbeat does not wait behind an ack in an open transaction', async () => {
    const queue = freshQueue()
    await enqueue(queue)
    const job = await claim(one, queue)
    await one.query('begin')
    expect(await ack(one, job)).toBe(true)
    await two.query(`set statement_timeout = '5s'`)
    expect(await heartbeat(two, job, LONG_MS)).toEqual(job.leased_until)
    await two.query('reset statement_timeout')
    await one.query('commit')
    expect(await heartbeat(two, job, LONG_MS)).toBeNull()
  })

  test('section 7: a settlement that is refused leaves the transaction of the caller usable; one that counts goes with it', async () => {
    const queue = freshQueue()
    await enqueue(queue)
    const first = await claim(one, queue, 0)
    const second = await claim(two, queue)
    await one.query('begin')
    await rows(one, 'insert into klieo.results values ($1)', [first.id])
    expect(await ack(one, first)).toBe(false)
    expect(await value(one, 'select 1')).toBe(1)
    await one.query('rollback')

    await two.query('begin')
    await rows(two, 'insert into klieo.results values ($1)', [second.id])
    expect(await ack(two, second)).toBe(true)
    await two.query('rollback')
    expect(await stored(queue)).toHaveLength(1)
    expect(await rows(one, 'select * from klieo.results where job = $1', [second.id])).toEqual([])

    await two.query('begin')
    await rows(two, 'insert into klieo.results values ($1)', [second.id])
    expect(await ack(two, second)).toBe(true)
    await two.query('commit')
    expect(await stored(queue)).toEqual([])
    expect(await rows(one, 'select * from klieo.results where job = $1', [second.id])).toHaveLength(1)
  })
})

describe('failing', () => {
  test('J3 a job whose worker dies each time ends after its attempts, with one dead letter', async () => {
    const queue = freshQueue()
    const id = await enqueue(queue, ', max_attempts => 3')
    for (const attempt of [1, 2, 3]) expect(await claim(one, queue, 0)).toMatchObject({ id, attempt })
    expect(await claim(two, queue)).toBeUndefined()
    expect(await claim(two, queue)).toBeUndefined()
    expect(await letters(queue)).toMatchObject([
      { payload_text: 'p', headers: { dlq_reason: 'max_attempts_exceeded', dlq_job_id: id, dlq_attempts: '3' } },
    ])
  })

  test('J4 a nak of the last attempt makes the job dead at once, and publishes its dead letter with the error', async () => {
    const queue = freshQueue()
    const id = await enqueue(queue, `, '{"h": "v"}', max_attempts => 1`)
    expect(await nak(one, await claim(one, queue), null, 'no\nstock')).toBe(true)
    expect(await letters(queue)).toEqual([
      {
        payload_text: 'p',
        headers: {
          h: 'v',
          dlq_reason: 'max_attempts_exceeded',
          dlq_queue: queue,
          dlq_job_id: id,
          dlq_attempts: '1',
          dlq_error: 'no stock',
        },
      },
    ])
    expect(await rows(one, 'select state, last_error from klieo.job_details where id = $1', [id])).toEqual([
      { state: 'dead', last_error: 'no\nstock' },
    ])
  })

  test('J4 dead_letter ends the job whatever attempts are left, with the reason', async () => {
    const queue = freshQueue()
    const id = await enqueue(queue)
    expect(await deadLetter(one, await claim(one, queue), 'no such customer')).toBe(true)
    expect(await letters(queue)).toMatchObject([{ headers: { dlq_reason: 'no such customer', dlq_job_id: id } }])
    expect(await value(one, 'select klieo.retry_dead($1)', [queue])).toBe('1')
    expect(await claim(one, queue)).toMatchObject({ id, attempt: 1, fence: 2 })
  })

  test.each([
    [1, 500, 1_000],
    [3, 2_000, 4_000],
    [40, 1_800_000, 3_600_000],
  ])('a nak without a delay after attempt %i comes back after %i to %i ms', async (attempt, least, most) => {
    const delays: number[] = []
    for (let round = 0; round < 20; round++) {
      const queue = freshQueue()
      await enqueue(queue, ', max_attempts => 100')
      await rows(one, 'update klieo.jobs set attempts = $2 where queue = $1', [queue, attempt - 1])
      const job = await claim(one, queue)
      expect(job.attempt).toBe(attempt)
      // The clock is read before and after: in between lies the nak.
      const before = await value<string>(one, 'select extract(epoch from clock_timestamp()) * 1000')
      expect(await nak(one, job, null, `failure ${attempt}`)).toBe(true)
      const [row] = await rows<{ at: string; now: string; last_error: string }>(
        one,
        `select extract(epoch from run_at) * 1000 as at, extract(epoch from clock_timestamp()) * 1000 as now, last_error
         from klieo.job_details where queue = $1`,
        [queue],
      )
      expect(row!.last_error).toBe(`failure ${attempt}`)
      expect(Number(row!.at) - Number(before)).toBeGreaterThanOrEqual(least)
      expect(Number(row!.at) - Number(row!.now)).toBeLessThanOrEqual(most)
      delays.push(Number(row!.at) - Number(before))
    }
    // Spread, and not two or three values.
    expect(new Set(delays.map((ms) => Math.round(ms / (least / 100)))).size).toBeGreaterThan(5)
  })

  test('a nak with a delay comes back after it, and not before; the error stays where none is given', async () => {
    const queue = freshQueue()
    await enqueue(queue)
    expect(await nak(one, await claim(one, queue), 0, 'first')).toBe(true)
    expect(await nak(one, await claim(one, queue), 300)).toBe(true)
    const [{ run_at: due, last_error: error }] = (await rows<{ run_at: Date; last_error: string }>(
      one,
      'select run_at, last_error from klieo.job_details where queue = $1',
      [queue],
    )) as [{ run_at: Date; last_error: string }]
    expect(error).toBe('first')
    const job = await eventuallyClaimed(two, queue)
    expect(job.attempt).toBe(3)
    expect(await value<Date>(one, 'select clock_timestamp()')).toSatisfy((now: Date) => now >= due)
  })

  test('release hands back what was not begun: the attempt is not counted and the place in the queue is kept', async () => {
    const queue = freshQueue()
    const id = await enqueue(queue, ', max_attempts => 1')
    await enqueue(queue)
    expect(await release(one, await claim(one, queue))).toBe(true)
    expect(await claim(two, queue)).toMatchObject({ id, attempt: 1, fence: 2 })
  })
})

describe('beside the package', () => {
  test('J2 a Worker and two foreign workers share a queue, and each job is done once', async () => {
    const queue = freshQueue()
    await bus.jobs.enqueueMany(
      queue,
      Array.from({ length: 150 }, (_, n) => ({ payload: String(n) })),
    )
    const done: string[] = []
    const by = { package: 0, foreign: 0 }
    // Held until both have had some: else whoever is quicker might do it all.
    const both = Promise.withResolvers<void>()
    const note = async (who: keyof typeof by, payload: Uint8Array) => {
      done.push(new TextDecoder().decode(payload))
      by[who]++
      if (by.package > 0 && by.foreign > 0) both.resolve()
      await both.promise
    }
    await using _worker = new Worker(bus.jobs, queue, (job) => note('package', job.payload), { concurrency: 2 })
    const foreign = [one, two].map(async (client) => {
      for (let job = await claim(client, queue); job; job = await claim(client, queue)) {
        await note('foreign', job.payload)
        expect(await ack(client, job)).toBe(true)
      }
    })
    await Promise.all(foreign)
    await eventually(async () => (await stored(queue)).length === 0, { what: 'the last job' })
    expect(done.map(Number).sort((a, b) => a - b)).toEqual(Array.from({ length: 150 }, (_, n) => n))
    expect(Math.min(by.package, by.foreign)).toBeGreaterThan(0)
  })

  test('J6 each takes over from the other, and the older claim of either is refused', async () => {
    const queue = freshQueue()
    await enqueue(queue)
    const theirs = await bus.jobs.claim(queue, 'package', 1)
    const mine = await eventuallyClaimed(one, queue, 0)
    expect(mine).toMatchObject({ id: theirs!.id, attempt: 2 })
    await expect(theirs!.ack()).rejects.toSatisfy((error) => error instanceof BusError && error.code === 'lease_lost')
    const again = await bus.jobs.claim(queue, 'package', LONG_MS)
    expect(again).toMatchObject({ id: mine.id, attempt: 3 })
    expect(await ack(one, mine)).toBe(false)
    await again!.ack()
    expect(await stored(queue)).toEqual([])
  })

  test('P14 who listens on klieo.channel() hears of what the package commits, and can wake its processes', async () => {
    const queue = freshQueue()
    const channel = await value<string>(one, 'select klieo.channel()')
    expect(channel).toBe(channelOf(schema))
    const heard: string[] = []
    two.on('notification', ({ payload }) => {
      heard.push(...(JSON.parse(payload ?? '{}') as { topics: string[] }).topics)
    })
    await two.query(`listen "${channel}"`)
    await bus.jobs.enqueue(queue, { payload: 'p' })
    await bus.pubsub.publish('foreign.heard', 'p')
    await eventually(() => heard.includes(`queue:${queue}`) && heard.includes('message:foreign.heard'), { what: 'the notifications' })
    await two.query('unlisten *')

    await using slow = await PostgresBus.connect({ connectionString: databaseUrl(), schema, maintenance: false, pollIntervalMs: 60_000 })
    const empty = freshQueue()
    const waiting = slow.jobs.claim(empty, 'package', LONG_MS, { waitMs: 30_000 })
    const stop = AbortSignal.timeout(20_000)
    await enqueue(empty)
    // Repeated, since the claim may not have begun to wait.
    const ringing = (async () => {
      while (!stop.aborted && (await stored(empty)).some((job) => (job as { token: unknown }).token === null)) {
        await one.query('select pg_notify($1, $2)', [channel, JSON.stringify({ from: 'sql', topics: [`queue:${empty}`] })])
        await new Promise((resolve) => setTimeout(resolve, 20))
      }
    })()
    expect(await waiting).toMatchObject({ queue: empty, attempt: 1 })
    await ringing
  })
})

test('section 7: arguments that break a rule are refused with 22023, and nothing is written', async () => {
  const queue = freshQueue()
  await enqueue(queue)
  const before = await stored(queue)
  const token = `'00000000-0000-0000-0000-000000000001'`
  const calls = [
    ...[`null`, `''`, `'a b'`, `'a..b'`, `repeat('q', 129)`].map((name) => `claim(${name}, 'w')`),
    ...[`null`, `''`, `repeat('w', 513)`].map((worker) => `claim('${queue}', ${worker})`),
    ...['null', '-1', '2147483648'].flatMap((ms) => [`claim('${queue}', 'w', ${ms})`, `heartbeat(1, ${token}, ${ms})`]),
    ...['null', '0', '1001'].map((most) => `claim('${queue}', 'w', max_jobs => ${most})`),
    ...['-1', '2147483648'].map((ms) => `nak(1, ${token}, ${ms})`),
    ...['ack', 'nak', 'heartbeat', 'release'].flatMap((name) => [`${name}(null, ${token})`, `${name}(1, null)`]),
    ...[`dead_letter(null, ${token}, 'r')`, `dead_letter(1, null, 'r')`, `dead_letter(1, ${token}, null)`],
  ]
  const wrong: string[] = []
  for (const call of calls) {
    const state = await stateOf(one, `select * from klieo.${call}`)
    if (state !== '22023') wrong.push(`${call}: ${state}`)
  }
  expect(wrong).toEqual([])
  expect(await stored(queue)).toEqual(before)
})

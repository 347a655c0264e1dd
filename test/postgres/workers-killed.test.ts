/** Processes that die or stop with work in their hands: kill -9 and SIGSTOP on real ones. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus, Worker } from '../../src/index.ts'
import { startChild } from '../support/child.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { deferred, eventually } from '../support/wait.ts'
import { startHolder } from './support/holder.ts'
import { outcome, Taker, text } from './support/outcome.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
const TTL_MS = 1_000

let bus: PostgresBus
let observer: Session
let queues = 0

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
  observer = await session(connectionString)
})

afterAll(async () => {
  await bus.close()
  await observer.query(`drop schema ${schema} cascade`)
  await observer[Symbol.asyncDispose]()
})

interface ChildJob {
  readonly job: { readonly id: string; readonly attempt: number; readonly fence: number } | null
}

interface ChildMessage {
  readonly message: { readonly seq: number; readonly attempt: number } | null
}

async function deadLetters(queue: string): Promise<{ headers: Record<string, string>; payload: Uint8Array }[]> {
  const { rows } = await observer.query(`select headers, payload from ${schema}.messages where subject = $1`, [`${queue}.dlq`])
  return rows as { headers: Record<string, string>; payload: Uint8Array }[]
}

describe('a worker killed between claim and ack', () => {
  test('J3 its job is claimable when the lease ends, not before, as the next attempt, with no reaper anywhere', async () => {
    const queue = `q${++queues}`
    const id = await bus.jobs.enqueue(queue, { payload: 'p' })
    await using holder = await startHolder(connectionString, schema)
    const asked = performance.now()
    const { job } = await holder.call<ChildJob>({ do: 'claim', queue, ttlMs: TTL_MS })
    expect(job).toMatchObject({ id, attempt: 1 })
    await holder.process.kill('SIGKILL')
    expect(await bus.jobs.claim(queue, 'w', TTL_MS)).toBeNull()
    const again = await bus.jobs.claim(queue, 'w', 60_000, { waitMs: 10_000 })
    const after = performance.now() - asked
    expect(again).toMatchObject({ id, attempt: 2 })
    expect(after).toBeGreaterThanOrEqual(TTL_MS)
    // A waiting claim is woken by the end of the lease, not by the poll.
    expect(after).toBeLessThan(TTL_MS + 1_000)
    await again?.ack()
    expect(await bus.jobs.claim(queue, 'w', TTL_MS)).toBeNull()
  })

  test('J3 on every attempt: exactly maxAttempts runs, then exactly one dead letter that tells the story', async () => {
    const queue = `q${++queues}`
    const id = await bus.jobs.enqueue(queue, { payload: 'poison', headers: { trace: 't1' }, dedupKey: 'k', maxAttempts: 5 })
    const runs: unknown[] = []
    for (let attempt = 1; attempt <= 5; attempt++) {
      await using child = startChild(new URL('./support/worker-child.ts', import.meta.url), {
        args: [connectionString, schema, queue, '400'],
      })
      runs.push(await child.next(({ began }) => began !== undefined))
      await child.kill('SIGKILL')
    }
    expect(runs).toEqual([1, 2, 3, 4, 5].map((attempt) => ({ began: id, attempt })))
    // Nobody reaps; whoever claims next buries it and gets nothing.
    expect(await bus.jobs.claim(queue, 'w', TTL_MS, { waitMs: 1_500 })).toBeNull()
    expect((await deadLetters(queue)).map(({ headers, payload }) => [text(payload), headers])).toEqual([
      [
        'poison',
        {
          trace: 't1',
          dlq_reason: 'max_attempts_exceeded',
          dlq_queue: queue,
          dlq_job_id: id,
          dlq_attempts: '5',
          dlq_dedup_key: 'k',
          dlq_error: 'the lease of the last attempt ran out',
        },
      ],
    ])
    const { rows } = await observer.query(`select state, attempts from ${schema}.job_details where id = $1`, [id])
    expect(rows).toEqual([{ state: 'dead', attempts: 5 }])
    expect(await bus.jobs.claim(queue, 'w', TTL_MS)).toBeNull()
  })

  test('J3 a worker beside it takes the job over, and its other jobs go on meanwhile', async () => {
    const queue = `q${++queues}`
    const [first] = await bus.jobs.enqueueMany(queue, [{ payload: 'first' }])
    await using doomed = startChild(new URL('./support/worker-child.ts', import.meta.url), {
      args: [connectionString, schema, queue, String(TTL_MS)],
    })
    await doomed.next(({ began }) => began === first)
    const done: string[] = []
    const over = deferred()
    await using _worker = new Worker(bus.jobs, queue, async (job) => {
      done.push(`${text(job.payload)}/${job.attempt}`)
      if (job.id === first) over.resolve()
    })
    await doomed.kill('SIGKILL')
    await bus.jobs.enqueue(queue, { payload: 'second' })
    await over.promise
    expect(done).toEqual(['second/1', 'first/2'])
  })
})

describe('a worker that is stopped for longer than its lease', () => {
  test('P7 and J6 its job runs elsewhere; when it goes on, its heartbeat and its ack are refused, and the job ran twice at most', async () => {
    const queue = `q${++queues}`
    const id = await bus.jobs.enqueue(queue, { payload: 'p' })
    await using holder = await startHolder(connectionString, schema)
    expect((await holder.call<ChildJob>({ do: 'claim', queue, ttlMs: TTL_MS })).job?.id).toBe(id)
    holder.process.pause()
    const again = await bus.jobs.claim(queue, 'w', 60_000, { waitMs: 10_000 })
    expect(again).toMatchObject({ id, attempt: 2 })
    holder.process.resume()
    expect(await holder.call({ do: 'heartbeat' })).toEqual({ outcome: 'lease_lost', aborted: true })
    expect(await holder.call({ do: 'ack' })).toEqual({ outcome: 'lease_lost' })
    expect(await outcome(again!.ack())).toBe('ok')
    expect(await bus.jobs.claim(queue, 'w', TTL_MS)).toBeNull()
  })

  test('J6 nobody took its job: when it goes on, its ack succeeds, and the job never runs again', async () => {
    const queue = `q${++queues}`
    const id = await bus.jobs.enqueue(queue, { payload: 'p' })
    await using holder = await startHolder(connectionString, schema)
    await holder.call<ChildJob>({ do: 'claim', queue, ttlMs: 300 })
    holder.process.pause()
    await eventually(async () => {
      const { rows } = await observer.query(`select visible_at < clock_timestamp() as over from ${schema}.jobs where id = $1`, [id])
      return (rows[0] as { over: boolean }).over
    })
    holder.process.resume()
    expect(await holder.call({ do: 'ack' })).toEqual({ outcome: 'ok' })
    expect(await bus.jobs.claim(queue, 'w', TTL_MS)).toBeNull()
  })

  test('P7 and P10 a member: what it held and what it had fetched go to the others; it yields nothing that ran out and settles nothing', async () => {
    const durable = `d${++queues}`
    await using holder = await startHolder(connectionString, schema)
    await holder.call({ do: 'subscribe', durable, ackWaitMs: TTL_MS })
    const sent = await bus.pubsub.publishMany(Array.from({ length: 8 }, () => ({ subject: durable, payload: 'p' })))
    const { message } = await holder.call<ChildMessage>({ do: 'take', withinMs: 5_000 })
    expect(message).toEqual({ seq: sent[0]!.seq, attempt: 1 })
    holder.process.pause()
    await using stream = await bus.pubsub.subscribe(durable, durable, { ackWaitMs: 60_000 })
    const taker = new Taker(stream)
    const got = []
    while (got.length < sent.length) got.push(await taker.expect())
    expect(got.map(({ seq }) => seq).sort((a, b) => a - b)).toEqual(sent.map(({ seq }) => seq))
    // All had been handed out: those that the stopped process only had in its buffer as well.
    expect(new Set(got.map(({ attempt }) => attempt))).toEqual(new Set([2]))
    holder.process.resume()
    expect(await holder.call({ do: 'ack-message' })).toEqual({ outcome: 'lease_lost' })
    expect(await holder.call({ do: 'take', withinMs: 500 })).toEqual({ message: null })
    for (const mine of got) expect(await outcome(mine.ack())).toBe('ok')
  })
})

describe('a member killed with messages in its hands', () => {
  test('P5 and P10 all of them, yielded or only fetched, are with the others when the ack wait is over, none twice', async () => {
    const durable = `d${++queues}`
    await using holder = await startHolder(connectionString, schema)
    await holder.call({ do: 'subscribe', durable, ackWaitMs: TTL_MS })
    const sent = await bus.pubsub.publishMany(Array.from({ length: 12 }, () => ({ subject: durable, payload: 'p' })))
    await holder.call<ChildMessage>({ do: 'take', withinMs: 5_000 })
    const killed = performance.now()
    await holder.process.kill('SIGKILL')
    await using stream = await bus.pubsub.subscribe(durable, durable, { ackWaitMs: 60_000 })
    const taker = new Taker(stream)
    const got = []
    while (got.length < sent.length) got.push(await taker.expect())
    expect(performance.now() - killed).toBeLessThan(TTL_MS + 1_000)
    expect(got.map(({ seq }) => seq).sort((a, b) => a - b)).toEqual(sent.map(({ seq }) => seq))
    await Promise.all(got.map((message) => message.ack()))
    const { rows } = await observer.query(
      `select from ${schema}.deliveries d join ${schema}.consumer_offsets o on o.id = d.consumer_id where o.durable = $1`,
      [durable],
    )
    expect(rows).toEqual([])
  })
})

describe('heartbeats', () => {
  test('J6 every third of the lease for ten leases: the job is never handed out elsewhere', async () => {
    const queue = `q${++queues}`
    const id = await bus.jobs.enqueue(queue, { payload: 'p' })
    await using rival = await startHolder(connectionString, schema)
    const finish = deferred()
    const began = deferred()
    await using _worker = new Worker(
      bus.jobs,
      queue,
      async () => {
        began.resolve()
        await finish.promise
      },
      { leaseTtlMs: 600 },
    )
    await began.promise
    // Another process waits for ten leases; a claim that waits is there at the very moment one ends.
    expect(await rival.call<ChildJob>({ do: 'claim', queue, ttlMs: 60_000, waitMs: 6_000 })).toEqual({ job: null })
    finish.resolve()
    await eventually(async () => (await observer.query(`select from ${schema}.jobs where id = $1`, [id])).rowCount === 0)
  })
})

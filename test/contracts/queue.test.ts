import { type } from 'arktype'
import pg from 'pg'
import * as v from 'valibot'
import { beforeAll, describe, expect, test } from 'vitest'
import { z } from 'zod'
import { type Bus, BusError, bytes, type ClaimedJob, defineQueue, encode, PostgresBus, type QueueContract } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { deferred, eventually } from '../support/wait.ts'
import { fresh, onEachBackend, stored } from './support/backends.ts'

type Receipt = { order: number }

onEachBackend((backend) => {
  let bus: Bus<never>
  beforeAll(async () => {
    bus = (await backend.connect()) as Bus<never>
  })

  const contracts: Readonly<Record<string, (queue: string) => QueueContract<Receipt>>> = {
    zod: (queue) => defineQueue(queue, z.object({ order: z.number() })) as QueueContract<Receipt>,
    valibot: (queue) => defineQueue(queue, v.object({ order: v.number() })) as QueueContract<Receipt>,
    arktype: (queue) => defineQueue(queue, type({ order: 'number' })) as QueueContract<Receipt>,
  }

  describe.each(Object.entries(contracts))('a schema of %s', (_name, define) => {
    test('T1 T7 the worker gets what matches; what does not is dead with the reason, and no handler sees it', async () => {
      const receipts = define(fresh())
      await expect(receipts.enqueue(bus, { order: 'x' } as never)).rejects.toMatchObject({ code: 'invalid_argument' })
      await expect(receipts.enqueueMany(bus, [{ data: { order: 1 } }, { data: 7 as never }])).rejects.toMatchObject({
        code: 'invalid_argument',
        message: expect.stringMatching(/^jobs\[1\]: data does not match: /),
      })
      const bad = await bus.jobs.enqueue(receipts.queue, { payload: encode({ order: 'x' }), headers: { trace: 'x' }, priority: 1 })
      await receipts.enqueue(bus, { order: 7 }, { headers: { trace: 'y' }, maxAttempts: 3 })
      const handled: unknown[] = []
      const errors: [string, string | undefined][] = []
      const worker = receipts.worker(
        bus,
        async (job, signal) => {
          const { id, queue, data, headers, attempt, maxAttempts, lease } = job
          expect(lease.expiresAt).toBeInstanceOf(Date)
          expect(signal).toBeInstanceOf(AbortSignal)
          expect(JSON.parse(Buffer.from(job.payload).toString())).toEqual(data)
          await job.heartbeat()
          handled.push({ id: typeof id, queue, data, headers, attempt, maxAttempts })
        },
        { onError: (error, job) => errors.push([(error as Error).message, job?.id]) },
      )
      await eventually(() => handled.length > 0)
      await worker.stop()
      expect(handled).toEqual([
        { id: 'string', queue: receipts.queue, data: { order: 7 }, headers: { trace: 'y' }, attempt: 1, maxAttempts: 3 },
      ])
      expect(errors).toEqual([[expect.stringMatching(/does not match: order: expected (a )?number; /), bad]])
      const letters = await stored(bus, `${receipts.queue}.dlq`)
      expect(letters.map(({ headers }) => headers)).toEqual([
        expect.objectContaining({
          trace: 'x',
          dlq_reason: expect.stringMatching(/^invalid_payload: order: expected (a )?number$/),
          dlq_queue: receipts.queue,
          dlq_job_id: bad,
          dlq_attempts: '1',
        }),
      ])
    })
  })

  test('T2 T7 a default is the receiver’s, a dedup key counts, and bytes stay bytes', async () => {
    const mails = defineQueue(fresh(), z.object({ to: z.string(), tries: z.number().default(3) }))
    const dedupKey = fresh()
    const id = await mails.enqueue(bus, { to: 'a' }, { dedupKey })
    expect(await mails.enqueue(bus, { to: 'b' }, { dedupKey })).toBe(id)
    const job = await mails.claim(bus, 'w', 10_000)
    expect(job).toMatchObject({ id, data: { to: 'a', tries: 3 } })
    await job?.ack()
    const blobs = defineQueue(fresh(), bytes())
    await blobs.enqueueMany(bus, [{ data: new Uint8Array([0, 255]), priority: 1 }, { data: 'text' }])
    const claimed = await blobs.claimMany(bus, 'w', 10_000, { limit: 5 })
    expect(claimed.map(({ data }) => data)).toEqual([new Uint8Array([0, 255]), new Uint8Array(Buffer.from('text'))])
    for (const one of claimed) await one.ack()
  })

  test('T7 a claim passes over what does not match, for as long as it may wait, and answers null when nothing else is there', async () => {
    const receipts = defineQueue<Receipt>(fresh())
    await bus.jobs.enqueueMany(receipts.queue, [{ payload: 'no JSON' }, { payload: '' }])
    expect(await receipts.claim(bus, 'w', 10_000)).toBeNull()
    expect(await stored(bus, `${receipts.queue}.dlq`)).toHaveLength(2)
    await bus.jobs.enqueue(receipts.queue, { payload: 'no JSON' })
    const waiting = receipts.claim(bus, 'w', 10_000, { waitMs: 10_000 })
    await eventually(async () => (await stored(bus, `${receipts.queue}.dlq`)).length === 3)
    await receipts.enqueue(bus, { order: 7 })
    const job = await waiting
    expect(job?.data).toEqual({ order: 7 })
    await job?.nak(0)
    const again = await receipts.claim(bus, 'w', 10_000)
    expect(again?.attempt).toBe(2)
    await again?.deadLetter('enough')
    expect((await stored(bus, `${receipts.queue}.dlq`)).at(-1)?.headers.dlq_reason).toBe('enough')
  })

  test('T7 claimMany answers what matches of what it claimed', async () => {
    const receipts = defineQueue<Receipt>(fresh())
    await bus.jobs.enqueueMany(receipts.queue, [{ payload: 'bad' }, { payload: encode({ order: 1 }) }, { payload: 'bad' }])
    await receipts.enqueue(bus, { order: 2 })
    const jobs = await receipts.claimMany(bus, 'w', 10_000, { limit: 4 })
    expect(jobs.map(({ data }) => data.order).sort()).toEqual([1, 2])
    for (const job of jobs) await job.ack()
    expect(await receipts.claimMany(bus, 'w', 10_000, { limit: 4 })).toEqual([])
    expect(await stored(bus, `${receipts.queue}.dlq`)).toHaveLength(2)
  })

  test('T7 a job that does not match and cannot be ended takes nothing from the caller, and comes again', async () => {
    const receipts = defineQueue<Receipt>(fresh())
    await bus.jobs.enqueue(receipts.queue, { payload: 'bad', priority: 1 })
    await receipts.enqueue(bus, { order: 1 })
    // Its connection is lost as it is about to be ended.
    const losing = async (claimed: Promise<ClaimedJob[]>) =>
      (await claimed).map((job) => {
        if (Buffer.from(job.payload).toString() !== 'bad') return job
        return new Proxy(job, {
          get: (target, key) => {
            if (key === 'deadLetter') return () => Promise.reject(new BusError('connection', 'lost'))
            const value: unknown = Reflect.get(target, key, target)
            return typeof value === 'function' ? value.bind(target) : value
          },
        })
      })
    const { jobs } = bus
    const lossy: Pick<Bus<never>, 'jobs'> = {
      jobs: {
        enqueue: (...args) => jobs.enqueue(...args),
        enqueueMany: (...args) => jobs.enqueueMany(...args),
        claim: (...args) => jobs.claim(...args),
        claimMany: (...args) => losing(jobs.claimMany(...args)),
      },
    }
    const claimed = await receipts.claimMany(lossy, 'w', 300, { limit: 2 })
    expect(claimed.map(({ data }) => data)).toEqual([{ order: 1 }])
    await claimed[0]?.ack()
    const alone = receipts.claimMany(lossy, 'w', 300, { limit: 2, waitMs: 5_000 })
    await expect(alone).rejects.toMatchObject({ code: 'connection', message: 'lost' })
    expect(await receipts.claim(bus, 'w', 10_000, { waitMs: 1_000 })).toBeNull()
    expect((await stored(bus, `${receipts.queue}.dlq`)).map(({ headers }) => headers.dlq_attempts)).toEqual(['3'])
  })

  test('T7 a handler of typed jobs is retried, settles itself and is stopped as any', async () => {
    const receipts = defineQueue(
      fresh(),
      z.object({ order: z.number() }).refine(async () => true),
    )
    await receipts.enqueue(bus, { order: 1 })
    await receipts.enqueue(bus, { order: 2 })
    const done = deferred()
    const seen: string[] = []
    const worker = receipts.worker(
      bus,
      async (job) => {
        seen.push(`${job.data.order}/${job.attempt}`)
        if (job.data.order === 1) return await job.deadLetter('not this one')
        if (job.attempt === 1) return await job.nak(0)
        done.resolve()
      },
      { concurrency: 1 },
    )
    await done.promise
    await worker.stop()
    expect(seen).toEqual(['1/1', '2/1', '2/2'])
    expect(await receipts.claim(bus, 'w', 10_000)).toBeNull()
  })

  test('T7 what the bus refuses it still refuses', async () => {
    const receipts = defineQueue<Receipt>(fresh())
    await expect(receipts.enqueue(bus, { order: 1 }, { priority: 101 })).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(receipts.enqueue(bus, { order: 1 }, { payload: 'x' } as never)).resolves.toBeTypeOf('string')
    await expect(receipts.claim(bus, '', 1_000)).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(receipts.claim(bus, 'w', 1_000, { waitMs: -1 })).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(receipts.claimMany(bus, 'w', 1_000, {} as never)).rejects.toMatchObject({ code: 'invalid_argument' })
    expect(() => receipts.worker(bus, 7 as never)).toThrow(expect.objectContaining({ code: 'invalid_argument' }))
    expect(() => receipts.worker({} as never, async () => {})).toThrow(expect.objectContaining({ code: 'invalid_argument' }))
    expect(() => defineQueue('no queue')).toThrow(expect.objectContaining({ code: 'invalid_argument' }))
    const job = await receipts.claim(bus, 'w', 10_000)
    expect(job?.data).toEqual({ order: 1 })
    await job?.ack()
  })
})

test('T1 T7 in the caller’s transaction a typed job is there if that commits, and done if that commits', async () => {
  const bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema: freshSchema() })
  const receipts = defineQueue('receipts', z.object({ order: z.number() }))
  const client = new pg.Client({ connectionString: databaseUrl() })
  await client.connect()
  for (const [order, how] of [
    [1, 'rollback'],
    [2, 'commit'],
  ] as const) {
    await client.query('begin')
    await receipts.enqueue(bus, { order }, { tx: client })
    await receipts.enqueueMany(bus, [{ data: { order: order * 10 } }], { tx: client })
    await client.query(how)
  }
  const jobs = await receipts.claimMany(bus, 'w', 30_000, { limit: 10 })
  expect(jobs.map(({ data }) => data.order)).toEqual([2, 20])
  await client.query('begin')
  for (const job of jobs) await job.ack({ tx: client })
  await client.query('commit')
  await expect(jobs[0]?.ack()).rejects.toMatchObject({ code: 'already_settled' })
  await client.end()
  await bus.close()
})

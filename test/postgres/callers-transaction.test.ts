import { Kysely, PostgresDialect } from 'kysely'
import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { BusError, PostgresBus, type PostgresTx, Worker } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

const connectionString = databaseUrl()
const schema = freshSchema()
let bus: PostgresBus
const unique = (name: string) => `${name}-${crypto.randomUUID()}`
const textOf = (bytes: Uint8Array | undefined) => Buffer.from(bytes ?? []).toString()

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema })
})

afterAll(() => bus.close())

/** Everything that takes `tx`, once. */
async function everything(tx: PostgresTx, name: string): Promise<void> {
  await bus.pubsub.publish(`tx.${name}`, 'published', { tx, headers: { h: 'ü' } })
  await bus.pubsub.publishMany([{ subject: `tx.${name}`, payload: new Uint8Array([0, 255, 92]), msgId: name }], { tx })
  await bus.jobs.enqueue(name, { payload: 'a job', dedupKey: 'k"\\,{}' }, { tx })
  await bus.jobs.enqueueMany(name, [{ payload: 'later', runAt: new Date(Date.now() + 3_600_000), priority: 3 }], { tx })
  const revision = await bus.kv.put(name, 'key', 'one', { tx })
  await bus.kv.cas(name, 'key', 'two', revision, { tx, ttlMs: 3_600_000 })
  await bus.kv.put(name, 'gone', 'x', { tx })
  await bus.kv.delete(name, 'gone', { tx })
}

async function expectEverything(name: string): Promise<void> {
  const stream = await bus.pubsub.subscribe(`tx.${name}`, unique('d'))
  const messages = []
  for await (const message of stream) {
    messages.push(message)
    await message.ack()
    if (messages.length === 2) break
  }
  await stream.close()
  expect(messages.map(({ payload }) => [...payload])).toEqual([[...Buffer.from('published')], [0, 255, 92]])
  expect(messages[0]?.headers).toEqual({ h: 'ü' })
  const job = await bus.jobs.claim(name, 'w', 60_000)
  expect(textOf(job?.payload)).toBe('a job')
  expect(await bus.jobs.claim(name, 'w', 60_000)).toBeNull()
  await job?.ack()
  expect(textOf((await bus.kv.get(name, 'key'))?.value)).toBe('two')
  expect(await bus.kv.get(name, 'gone')).toBeNull()
}

describe('the caller’s transaction', () => {
  test('P1 J1 a Kysely transaction takes part in every call, and rolls all of it back', async () => {
    const db = new Kysely<Record<string, never>>({ dialect: new PostgresDialect({ pool: new pg.Pool({ connectionString, max: 2 }) }) })
    try {
      const name = unique('kysely')
      await db.transaction().execute((tx) => everything(tx, name))
      await expectEverything(name)
      const lost = unique('lost')
      const failed = db.transaction().execute(async (tx) => {
        await everything(tx, lost)
        throw new Error('no')
      })
      await expect(failed).rejects.toThrow('no')
      expect(await bus.jobs.claim(lost, 'w', 1_000)).toBeNull()
      expect(await bus.kv.get(lost, 'key')).toBeNull()
    } finally {
      await db.destroy()
    }
  })

  test('P1 J1 an object with query() takes part, whatever its session has set', async () => {
    await using client = await session(connectionString)
    await client.query(
      `set bytea_output = escape; set datestyle = 'German, DMY'; set timezone = 'Asia/Kathmandu'; set search_path = pg_temp`,
    )
    const name = unique('adapter')
    await client.query('begin')
    await everything({ query: (text, values) => client.query(text, values) }, name)
    await client.query('commit')
    await expectEverything(name)
  })

  test.each(['repeatable read', 'serializable'])('P1 J1 a transaction that is %s takes part', async (isolation) => {
    await using client = await session(connectionString)
    const name = unique('isolation')
    await client.query(`begin isolation level ${isolation}`)
    await everything(client, name)
    await client.query('commit')
    await expectEverything(name)
  })

  test('P1 J1 what a savepoint rolls back is gone, the rest stays', async () => {
    await using client = await session(connectionString)
    const name = unique('savepoint')
    await client.query('begin; savepoint one')
    await everything(client, name)
    await client.query('rollback to one')
    await bus.jobs.enqueue(name, { payload: 'kept', dedupKey: 'k"\\,{}' }, { tx: client })
    await client.query('savepoint two')
    await bus.kv.put(name, 'key', 'released', { tx: client })
    await client.query('release two')
    await client.query('commit')
    expect(textOf((await bus.jobs.claim(name, 'w', 1_000))?.payload)).toBe('kept')
    expect(await bus.jobs.claim(name, 'w', 1_000)).toBeNull()
    expect(textOf((await bus.kv.get(name, 'key'))?.value)).toBe('released')
  })

  test('P7 a refused ack and a lost cas leave the transaction usable', async () => {
    await using client = await session(connectionString)
    const name = unique('refused')
    await bus.jobs.enqueue(name, { payload: 'x' })
    const first = await bus.jobs.claim(name, 'first', 1)
    const second = await bus.jobs.claim(name, 'second', 60_000, { waitMs: 5_000 })
    await client.query('begin')
    await expect(first?.ack({ tx: client })).rejects.toMatchObject({ code: 'lease_lost' })
    await expect(bus.kv.cas(name, 'key', 'x', 77, { tx: client })).rejects.toMatchObject({
      code: 'cas_conflict',
      expected: 77,
      actual: null,
    })
    await bus.kv.put(name, 'key', 'still there', { tx: client })
    await client.query('commit')
    expect(textOf((await bus.kv.get(name, 'key'))?.value)).toBe('still there')
    await second?.ack()
  })

  test('J6 Worker: a job that its handler acked in a transaction that was rolled back comes back, though the handler returned', async () => {
    await using client = await session(connectionString)
    const name = unique('rolled-back')
    const attempts: number[] = []
    let done = false
    await using _worker = new Worker(
      bus.jobs,
      name,
      async (job) => {
        attempts.push(job.attempt)
        await client.query('begin')
        await job.ack({ tx: client })
        await client.query(job.attempt === 1 ? 'rollback' : 'commit')
        done = job.attempt === 2
      },
      { leaseTtlMs: 500 },
    )
    await bus.jobs.enqueue(name, { payload: 'x' })
    await eventually(() => done, { what: 'the second attempt' })
    expect(attempts).toEqual([1, 2])
    expect(await bus.jobs.claim(name, 'w', 1_000)).toBeNull()
  })

  test('section 7 what is no transaction is refused by its name', async () => {
    const pool = new pg.Pool({ connectionString })
    const db = new Kysely<Record<string, never>>({ dialect: new PostgresDialect({ pool }) })
    try {
      for (const tx of [pool, db, {}, 'begin', 7, null] as unknown as PostgresTx[]) {
        const error = await bus.pubsub.publish('a', 'b', { tx }).catch((reason: unknown) => reason)
        expect(error).toBeInstanceOf(BusError)
        expect(error).toMatchObject({ code: 'invalid_argument', message: expect.stringContaining('tx') })
      }
    } finally {
      await db.destroy()
    }
  })

  test('section 7 in a transaction that has failed before the answer is conflict, with the server’s error as cause', async () => {
    await using client = await session(connectionString)
    await client.query('begin')
    await expect(client.query('select 1/0')).rejects.toThrow()
    await expect(bus.pubsub.publish('a', 'b', { tx: client })).rejects.toMatchObject({
      code: 'conflict',
      retryable: false,
      cause: { code: '25P02' },
    })
    await client.query('rollback')
  })
})

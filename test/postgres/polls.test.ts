/**
 * What nobody is told of (P14): everything that waits finds it by looking for itself. Written by SQL it rings no bell; and two
 * buses that cannot listen hear nothing of each other.
 */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { text } from './support/outcome.ts'
import { take } from './support/reading.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
/** Far above a poll: on a busy machine it may be late. What is never looked for does not come at all. */
const PATIENCE_MS = 15_000
/** Nobody listens on it. */
const NOBODY = 'postgres://nobody@127.0.0.1:1/none'

let bus: PostgresBus
let observer: Session
let names = 0

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false, pollIntervalMs: 200 })
  observer = await session(connectionString)
})

afterAll(async () => {
  await bus.close()
  await observer.query(`drop schema ${schema} cascade`)
  await observer[Symbol.asyncDispose]()
})

const fresh = () => `p${++names}`

/** Resolves once the bus has looked in vain for the first time: what is written from then on it finds by looking again, or never. */
async function untilLooked(at: string): Promise<void> {
  await eventually(
    async () => {
      const { rowCount } = await observer.query(`select from pg_stat_activity where state = 'idle' and query like '%' || $1 || '%'`, [
        `"${schema}".${at}`,
      ])
      return rowCount !== 0
    },
    { everyMs: 10, what: `a look at ${at}` },
  )
}

describe('what a session of SQL writes', () => {
  test('P14 a message that nobody is told of comes with the poll', async () => {
    const subject = fresh()
    await using stream = await bus.pubsub.subscribe(subject, subject)
    const coming = take(stream, 2, PATIENCE_MS)
    await untilLooked('fetch_messages')
    await observer.query(`select ${schema}.publish($1, 'one')`, [subject])
    await observer.query(`select ${schema}.publish($1, 'two')`, [subject])
    expect(await coming).toEqual(['one', 'two'])
  })

  test('P14 a job that nobody is told of comes with the poll', async () => {
    const queue = fresh()
    // At the end of its waiting it looks once more, whatever happens: called off before, it does not.
    const coming = bus.jobs.claim(queue, 'w', 60_000, { waitMs: 30_000, signal: AbortSignal.timeout(PATIENCE_MS) })
    await untilLooked('take_jobs')
    await observer.query(`select ${schema}.enqueue($1, 'job')`, [queue])
    const job = await coming
    expect(job && text(job.payload)).toBe('job')
    await job?.ack()
  })

  test('P14 a change that nobody is told of comes with the poll', async () => {
    const bucket = fresh()
    await using watch = await bus.kv.watch(bucket, undefined, { updatesOnly: true, signal: AbortSignal.timeout(PATIENCE_MS) })
    const coming = watch[Symbol.asyncIterator]().next()
    await untilLooked('kv_changes')
    await observer.query(`select ${schema}.kv_put($1, 'k', 'v')`, [bucket])
    expect((await coming).value).toMatchObject({ operation: 'put', entry: { key: 'k' } })
  })

  test('P14 a lease whose end nobody is told of is granted with the poll', async () => {
    const bucket = fresh()
    await bus.kv.lease(bucket, 'k', 60_000)
    const coming = bus.kv.lease(bucket, 'k', 60_000, { waitMs: 30_000, signal: AbortSignal.timeout(PATIENCE_MS) })
    await untilLooked('lease_left')
    await observer.query(`update ${schema}.kv_leases set expires_at = '-infinity' where bucket = $1`, [bucket])
    await (await coming).release()
  })
})

describe('two buses that cannot listen', () => {
  const deaf = { connectionString, schema, maintenance: false, pollIntervalMs: 100, listenConnectionString: NOBODY }

  test('P14 messages, jobs and requests go from one to the other all the same', async () => {
    const [here, there] = await Promise.all([PostgresBus.connect(deaf), PostgresBus.connect(deaf)])
    try {
      const name = fresh()
      await using stream = await there.pubsub.subscribe(name, name)
      const message = take(stream, 1, PATIENCE_MS)
      const job = there.jobs.claim(name, 'w', 60_000, { waitMs: 30_000, signal: AbortSignal.timeout(PATIENCE_MS) })
      await there.requestReply.respond(name, ({ payload }) => payload)
      await here.pubsub.publish(name, 'm')
      await here.jobs.enqueue(name, { payload: 'j' })
      expect(text(await here.requestReply.request(name, 'r', { timeoutMs: PATIENCE_MS }))).toBe('r')
      expect(await message).toEqual(['m'])
      expect(text((await job)!.payload)).toBe('j')
    } finally {
      await Promise.all([here.close(), there.close()])
    }
  })
})

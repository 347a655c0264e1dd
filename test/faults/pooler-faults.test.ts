/** A bus behind PgBouncer in transaction mode: woken by a direct connection, and with prepared statements that the pooler mixes up. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus, type PostgresBusOptions, Worker } from '../../src/index.ts'
import { outcome, Taker, text } from '../postgres/support/outcome.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { count } from './support/network/backends.ts'
import { findPgBouncer, type Installed, PgBouncer } from './support/network/pgbouncer.ts'

const direct = databaseUrl()
const found = await findPgBouncer()
const installed = found as Installed
const LONG_MS = 120_000

let observer: Session

beforeAll(async () => {
  observer = await session(direct)
})

afterAll(() => observer[Symbol.asyncDispose]())

async function pooled(
  body: (pooler: PgBouncer, connect: (options?: PostgresBusOptions) => Promise<PostgresBus>, schema: string) => Promise<void>,
  settings: Readonly<Record<string, string>> = {},
): Promise<void> {
  const schema = freshSchema()
  await using pooler = await PgBouncer.start(installed, direct, settings)
  const buses: PostgresBus[] = []
  try {
    await body(
      pooler,
      async (options = {}) => {
        const bus = await PostgresBus.connect({
          connectionString: pooler.connectionString,
          schema,
          maintenance: false,
          preparedStatements: false,
          ...options,
        })
        buses.push(bus)
        return bus
      },
      schema,
    )
  } finally {
    await Promise.all(buses.map((bus) => bus.close()))
  }
}

describe.skipIf(!found)(`behind PgBouncer${found ? '' : ' (SKIPPED: pgbouncer is not installed)'}`, () => {
  test(
    'P14 with a direct connection to listen on, a stream, a claim, a watch, a lease and a request are woken, not polled',
    { timeout: 90_000 },
    () =>
      pooled(async (_pooler, connect) => {
        const options = { listenConnectionString: direct, pollIntervalMs: 600_000 }
        const [here, there] = await Promise.all([connect(options), connect(options)])
        const name = 'woken'
        const taker = new Taker(await there.pubsub.subscribe(name, name))
        await here.pubsub.publish(name, 'first')
        await (await taker.expect()).ack()
        await using watch = await there.kv.watch(name, undefined, { updatesOnly: true })
        const change = watch[Symbol.asyncIterator]().next()
        const claim = there.jobs.claim(name, 'w', LONG_MS, { waitMs: 30_000 })
        const lease = await here.kv.lease(name, 'k', LONG_MS)
        const waiting = there.kv.lease(name, 'k', LONG_MS, { waitMs: 30_000 })
        const message = taker.expect(20_000)
        await using _responder = await there.requestReply.respond(name, ({ payload }) => payload)
        await here.pubsub.publish(name, 'second')
        await here.jobs.enqueue(name, { payload: 'job' })
        await here.kv.put(name, 'k', 'v')
        await lease.release()
        expect(text((await message).payload)).toBe('second')
        expect(text((await claim)!.payload)).toBe('job')
        expect((await change).value).toMatchObject({ operation: 'put' })
        await (await waiting).release()
        expect(text(await here.requestReply.request(name, 'r', { timeoutMs: 20_000 }))).toBe('r')
      }),
  )

  test(
    'P1 J2 K4 prepared statements that the pooler mixes up between connections: every call goes through all the same, concurrently too',
    { timeout: 90_000 },
    () =>
      pooled(
        async (_pooler, connect, schema) => {
          const buses = await Promise.all([1, 2, 3].map(() => connect({ preparedStatements: true, pollIntervalMs: 100 })))
          const calls = (bus: PostgresBus, who: number) =>
            Array.from({ length: 40 }, (_, n) => [
              bus.pubsub.publish('prepared', `${who}-${n}`, { msgId: `${who}-${n}` }),
              bus.jobs.enqueue('prepared', { payload: 'x', dedupKey: `${who}-${n}` }),
              bus.kv.put('prepared', `${who}-${n}`, 'v'),
              bus.kv.get('prepared', `${who}-${n}`),
              bus.jobs.claim('none', 'w', 1_000),
            ]).flat()
          const results = await Promise.all(buses.flatMap((bus, who) => calls(bus, who).map((call) => outcome(call))))
          expect(new Set(results)).toEqual(new Set(['ok']))
          expect(await count(observer, `${schema}.messages where subject = 'prepared'`)).toBe(120)
          expect(await count(observer, `${schema}.jobs`)).toBe(120)
        },
        { default_pool_size: '5' },
      ),
  )

  test(
    'P1 P3 P12 J1 J5 it is killed, started anew and told to reconnect under load: what was answered is there once, and all goes on',
    { timeout: 120_000 },
    () =>
      pooled(
        async (pooler, connect, schema) => {
          const [writing, reading] = await Promise.all([connect({ pollIntervalMs: 100 }), connect({ pollIntervalMs: 100 })])
          const delivered = new Set<string>()
          const worked: string[] = []
          await using stream = await reading.pubsub.subscribe('killed', 'killed', { ackWaitMs: 2_000 })
          const consuming = (async () => {
            for await (const message of stream) {
              delivered.add(text(message.payload))
              await outcome(message.ack())
            }
          })()
          await using worker = new Worker(reading.jobs, 'killed', async (job) => void worked.push(text(job.payload)), {
            concurrency: 4,
            leaseTtlMs: 2_000,
            onError: () => {},
          })
          // With an id a call may be made again that may have happened.
          const surely = async (call: () => Promise<unknown>) => {
            await eventually(async () => expect(await outcome(call())).toBe('ok'), { timeoutMs: 40_000, everyMs: 20 })
          }
          const written: string[] = []
          let failed = 0
          let over = false
          const writers = Array.from({ length: 6 }, async (_, who) => {
            for (let n = 0; !over; n++) {
              const id = `${who}-${n}`
              const publish = () => writing.pubsub.publish('killed', id, { msgId: id })
              const enqueue = () => writing.jobs.enqueue('killed', { payload: id, dedupKey: id, maxAttempts: 1_000 })
              const first = await Promise.all([outcome(publish()), outcome(enqueue())])
              if (first.some((one) => one !== 'ok')) failed++
              await Promise.all([surely(publish), surely(enqueue)])
              written.push(id)
            }
          })
          const more = (count: number) => {
            const until = written.length + count
            return eventually(() => written.length >= until, { timeoutMs: 40_000, what: `${count} more` })
          }
          for (let round = 0; round < 2; round++) {
            await more(60)
            await pooler.stop()
            await pooler.start()
            await more(60)
            await pooler.command('RECONNECT')
          }
          await more(60)
          over = true
          await Promise.all(writers)
          expect(failed).toBeGreaterThan(0)
          await eventually(
            async () => {
              expect(delivered.size).toBe(written.length)
              expect(await count(observer, `${schema}.jobs`)).toBe(0)
            },
            { timeoutMs: 40_000, what: 'the last message and the last job' },
          )
          expect(await count(observer, `${schema}.messages where subject = 'killed'`)).toBe(written.length)
          expect(new Set(worked)).toEqual(new Set(written))
          await worker.stop()
          await stream.close()
          await consuming
        },
        { server_login_retry: '1' },
      ),
  )

  test('a pooler that takes no more clients, or whose server is gone, is told as connection or unavailable', { timeout: 60_000 }, () =>
    pooled(
      async (pooler, connect) => {
        const held = await Promise.all([session(pooler.connectionString), session(pooler.connectionString)])
        const refused = await outcome(connect())
        expect(['connection', 'unavailable']).toContain(refused)
        for (const client of held) await client[Symbol.asyncDispose]()
      },
      { max_client_conn: '2' },
    ),
  )
})

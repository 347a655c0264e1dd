/** The server has no connection to spare (53300): for whoever connects, and for a bus at work that has lost those it had. */

import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { BusError, PostgresBus, Worker } from '../../src/index.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/index.ts'
import { outcome, Taker, text } from '../postgres/support/outcome.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

/** Of these three are for superusers, who here are the test. */
const MAX_CONNECTIONS = 16

let server: EmbeddedPostgres
let admin: Session
let url: string
let refusals = 0

beforeAll(async () => {
  server = await startEmbeddedPostgres({
    settings: { max_connections: `${MAX_CONNECTIONS}`, superuser_reserved_connections: '3', autovacuum: 'off' },
    onLog: (line) => {
      if (/too many connections for role/.test(line)) refusals++
    },
  })
  admin = await session(server.connectionString)
  await admin.query(`create role app login password 'p'`)
  await admin.query('grant create on database postgres to app')
  const own = new URL(server.connectionString)
  own.username = 'app'
  own.password = 'p'
  url = own.href
  await (await PostgresBus.connect({ connectionString: url })).close()
})
afterAll(async () => {
  await admin[Symbol.asyncDispose]()
  await server.stop('immediate')
})

/** Takes every connection there is. */
async function takeAll(hogs: Session[]): Promise<void> {
  for (;;) {
    const hog = await session(url, { applicationName: 'hog' }).catch((error: { code?: string }) => {
      if (error.code !== '53300') throw error
      return undefined
    })
    if (!hog) return
    hogs.push(hog)
  }
}

async function release(hogs: Session[]): Promise<void> {
  await Promise.all(hogs.splice(0).map((hog) => hog[Symbol.asyncDispose]()))
}

/**
 * From now on the role may have so many. Said of the role, because hogs that race a bus at work for its connections win one now and lose
 * it then; the server refuses with the same code.
 */
async function allow(connections: number): Promise<void> {
  await admin.query(`alter role app connection limit ${connections}`)
  if (connections >= 0) await admin.query(`select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'`)
}

async function failureOf(call: Promise<unknown>): Promise<BusError> {
  const error = await call.then(
    () => undefined,
    (reason: unknown) => reason,
  )
  expect(error).toBeInstanceOf(BusError)
  return error as BusError
}

describe('no connection to spare', () => {
  test('a connect is unavailable and retryable, leaves nothing behind, and succeeds as soon as there is room', async () => {
    const hogs: Session[] = []
    await takeAll(hogs)
    for (let n = 0; n < 5; n++) {
      const failure = await failureOf(PostgresBus.connect({ connectionString: url }))
      expect(failure).toMatchObject({ code: 'unavailable', retryable: true, cause: { code: '53300' } })
    }
    // Enough for the pool's own, LISTEN and one more.
    await release(hogs.splice(0, 3))
    await using bus = await eventually(() => PostgresBus.connect({ connectionString: url }))
    expect(await outcome(bus.kv.put('room', 'k', 'v'))).toBe('ok')
    await release(hogs)
  })

  test('P3 P14 J2 K5 K6 R2 under load: calls are unavailable and retryable, what waits backs off and lasts, and all goes on by itself', async () => {
    const pool = new pg.Pool({ connectionString: url, max: 6 })
    pool.on('error', () => {})
    const bus = await PostgresBus.connect({ pool, pollIntervalMs: 200 })
    try {
      await using stream = await bus.pubsub.subscribe('load', 'load')
      const taker = new Taker(stream)
      await using watch = await bus.kv.watch('load', undefined, { updatesOnly: true })
      const change = watch[Symbol.asyncIterator]().next()
      await using _responder = await bus.requestReply.respond('load.ask', ({ payload }) => payload)
      const handled: string[] = []
      const reported = new Set<string>()
      const worker = new Worker(bus.jobs, 'worked', async ({ payload }) => void handled.push(text(payload)), {
        onError: (error) => reported.add((error as BusError).code),
      })
      const claim = outcome(bus.jobs.claim('waited', 'w', 60_000, { waitMs: 30_000 }))
      const lease = await bus.kv.lease('load', 'k', 60_000)
      expect(text(await bus.requestReply.request('load.ask', 'before', { timeoutMs: 10_000 }))).toBe('before')

      await allow(0)
      // What was on its way when its connection was terminated.
      await eventually(async () => expect((await failureOf(bus.kv.get('load', 'k'))).code).toBe('unavailable'))
      const calls: Record<string, () => Promise<unknown>> = {
        publish: () => bus.pubsub.publish('load', 'refused', { msgId: 'refused' }),
        publishMany: () => bus.pubsub.publishMany([{ subject: 'load', payload: 'refused' }]),
        subscribe: () => bus.pubsub.subscribe('load', 'new'),
        enqueue: () => bus.jobs.enqueue('worked', { payload: 'refused', dedupKey: 'refused' }),
        claim: () => bus.jobs.claim('worked', 'w', 1_000),
        put: () => bus.kv.put('load', 'refused', 'v'),
        cas: () => bus.kv.cas('load', 'refused', 'v', null),
        get: () => bus.kv.get('load', 'refused'),
        lease: () => bus.kv.lease('load', 'other', 1_000),
        heartbeat: () => lease.heartbeat(),
        request: () => bus.requestReply.request('load.ask', 'refused', { timeoutMs: 10_000 }),
      }
      for (const [call, make] of Object.entries(calls)) {
        expect.soft(await failureOf(make()), call).toMatchObject({ code: 'unavailable', retryable: true })
      }
      expect(lease.signal.aborted).toBe(false)
      // It says so, and may be made again.
      expect(['unavailable', 'connection']).toContain(await claim)

      // Loops that wait ask ever less often: a stream, a watch, a worker, LISTEN, presence, a responder, maintenance.
      const loops = 7
      refusals = 0
      await admin.query('select pg_sleep(4)')
      expect(refusals).toBeGreaterThan(0)
      // Without a pause between them a refusal takes a few milliseconds, with the first pause of 50 ms there would be 80 of each.
      expect(refusals).toBeLessThan(loops * 20)

      await allow(-1)
      await eventually(async () => expect(await outcome(bus.pubsub.publish('load', 'after', { msgId: 'refused' }))).toBe('ok'))
      // The id was not taken by the call that was refused.
      const message = await taker.expect(15_000)
      expect(text(message.payload)).toBe('after')
      await message.ack()
      await bus.kv.put('load', 'after', 'v')
      expect((await change).value).toMatchObject({ operation: 'put', entry: { key: 'after' } })
      await bus.jobs.enqueue('worked', { payload: 'after', dedupKey: 'refused' })
      await eventually(() => expect(handled).toEqual(['after']), { timeoutMs: 15_000 })
      await eventually(async () => expect(await outcome(bus.requestReply.request('load.ask', 'after', { timeoutMs: 1_000 }))).toBe('ok'), {
        timeoutMs: 15_000,
      })
      await lease.heartbeat()
      for (const code of reported) expect(['unavailable', 'connection']).toContain(code)
      await worker.stop()
    } finally {
      await allow(-1)
      await bus.close()
      await pool.end()
    }
  }, 120_000)

  test('P1 J1 K1 room for fewer connections than the pool wants: what is refused did not happen, and said again it happens once', async () => {
    const pool = new pg.Pool({ connectionString: url, max: 12 })
    pool.on('error', () => {})
    await using bus = await PostgresBus.connect({ pool, maintenance: false })
    await using client = await session(server.connectionString)
    try {
      // Those it has are among them; nothing is terminated, or a call could meet a connection that is gone.
      await admin.query('alter role app connection limit 4')
      const codes = new Set<string>()
      const insist = async (call: () => Promise<unknown>) => {
        await eventually(
          async () => {
            const code = await outcome(call())
            codes.add(code)
            // Anything else would not be safe to repeat.
            if (code !== 'ok' && code !== 'unavailable') throw new Error(code)
            return code === 'ok'
          },
          { timeoutMs: 40_000, everyMs: 25 },
        )
      }
      await Promise.all(
        Array.from({ length: 20 }, (_, n) => n).flatMap((n) => [
          insist(() => bus.pubsub.publishMany([{ subject: 'few', payload: `${n}` }])),
          insist(() => bus.jobs.enqueueMany('few', [{ payload: `${n}` }, { payload: `${n}` }])),
          insist(() => bus.kv.cas('few', `${n}`, 'v', null)),
        ]),
      )
      expect([...codes].sort()).toEqual(['ok', 'unavailable'])
      const { rows } = await client.query(
        `select (select count(*) from klieo.messages where subject = 'few')::int as messages,
           (select count(*) from klieo.jobs where queue = 'few')::int as jobs,
           (select count(*) from klieo.kv_entries where bucket = 'few')::int as keys`,
      )
      expect(rows).toEqual([{ messages: 20, jobs: 40, keys: 20 }])
    } finally {
      await allow(-1)
    }
    await bus.close()
    await pool.end()
  }, 120_000)
})

/**
 * Wake-ups (P14). The buses here poll once a minute: whatever comes in these tests came because somebody was woken. No test
 * measures 50 ms, which a busy machine cannot promise; a lost wake-up is a minute late.
 */

import { Kysely, PostgresDialect } from 'kysely'
import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type MsgStream, PostgresBus, type PostgresTx } from '../../src/index.ts'
import { channelOf } from '../../src/postgres/schema-name.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { outcome, Taker, text } from './support/outcome.ts'
import { next as nextMessage, take } from './support/reading.ts'
import { rival } from './support/rival.ts'

const connectionString = databaseUrl()
/** With a dash, a capital and the length of an identifier: it must be quoted wherever it goes. */
const schema = `${freshSchema()}-Wake-${'x'.repeat(63)}`.slice(0, 63)
const quoted = `"${schema}"`
const POLL_MS = 60_000
/** Far below a poll, far above what a busy machine needs. */
const SOON_MS = 5_000
/** Of this run alone: its sessions are terminated, and another run may be on the same server. */
const LISTENER = `${freshSchema()} listen`

let bus: PostgresBus
let other: PostgresBus
let observer: Session
let names = 0

function named(url: string, name: string): string {
  const named_ = new URL(url)
  named_.searchParams.set('application_name', name)
  return named_.href
}

const options = { connectionString, schema, maintenance: false, pollIntervalMs: POLL_MS }

beforeAll(async () => {
  bus = await PostgresBus.connect(options)
  other = await PostgresBus.connect({ ...options, listenConnectionString: named(connectionString, LISTENER) })
  observer = await session(connectionString)
})

afterAll(async () => {
  await Promise.all([bus.close(), other.close()])
  await observer.query(`drop schema ${quoted} cascade`)
  await observer[Symbol.asyncDispose]()
})

const fresh = () => `w${++names}`

/** A stream of the other bus that has looked and found nothing. */
async function listening(subject: string): Promise<MsgStream<PostgresTx>> {
  const stream = await other.pubsub.subscribe(subject, subject)
  // What comes after this was not there at its first look.
  await bus.pubsub.publish(subject, 'first')
  expect(await take(stream, 1, SOON_MS)).toEqual(['first'])
  return stream
}

/** Asks before it is committed: who asks afterwards looks for himself, and shows nothing of being woken. */
function waitingFor(stream: MsgStream<PostgresTx>, count: number): Promise<string[]> {
  const coming = take(stream, count, 3 * SOON_MS)
  coming.catch(() => {})
  return coming
}

async function listenerPid(but = 0): Promise<number> {
  return eventually(
    async () => {
      const { rows } = await observer.query(
        `select pid from pg_stat_activity where application_name = $1 and query ilike 'listen%' and pid <> $2`,
        [LISTENER, but],
      )
      return (rows[0] as { pid: number } | undefined)?.pid ?? 0
    },
    { everyMs: 5, what: 'a session that listens' },
  )
}

describe('what commits wakes', () => {
  test('P14 a publish, a put, a job, a lease that ends and a request', async () => {
    const name = fresh()
    const stream = await listening(name)
    await bus.pubsub.publish(name, 'm')
    expect(await take(stream, 1, SOON_MS)).toEqual(['m'])

    await using watch = await other.kv.watch(name, undefined, { updatesOnly: true })
    const change = watch[Symbol.asyncIterator]().next()
    await bus.kv.put(name, 'k', 'v')
    expect((await change).value).toMatchObject({ operation: 'put' })

    const claim = other.jobs.claim(name, 'w', 60_000, { waitMs: 20_000 })
    await bus.jobs.enqueue(name, { payload: 'j' })
    expect(text((await claim)!.payload)).toBe('j')

    const lease = await bus.kv.lease(name, 'l', 60_000)
    const waiting = other.kv.lease(name, 'l', 60_000, { waitMs: 20_000 })
    await lease.release()
    await (await waiting).release()

    await using _responder = await other.requestReply.respond(name, ({ payload }) => payload)
    expect(text(await bus.requestReply.request(name, 'r', { timeoutMs: 5_000 }))).toBe('r')
    await stream.close()
  })

  test('P14 a publish in a transaction of a pg client that commits late: not before, and then without a poll', async () => {
    const name = fresh()
    const stream = await listening(name)
    await using caller = await rival(connectionString)
    await caller.query('begin')
    await bus.pubsub.publish(name, 'late', { tx: caller })
    await bus.pubsub.publish(name, 'beside')
    expect(await take(stream, 1, SOON_MS)).toEqual(['beside'])
    const late = waitingFor(stream, 1)
    // Longer than the longest pause between two looks at open transactions.
    await observer.query('select pg_sleep(0.3)')
    await caller.query('commit')
    expect(await late).toEqual(['late'])
    await stream.close()
  })

  test('P14 so does one in a Kysely transaction, and one that is rolled back wakes nobody to nothing', async () => {
    const name = fresh()
    const stream = await listening(name)
    const db = new Kysely<Record<string, never>>({ dialect: new PostgresDialect({ pool: new pg.Pool({ connectionString }) }) })
    try {
      let coming = waitingFor(stream, 1)
      await db.transaction().execute(async (tx) => {
        await bus.pubsub.publish(name, 'kysely', { tx })
      })
      expect(await coming).toEqual(['kysely'])
      coming = waitingFor(stream, 1)
      await expect(
        db.transaction().execute(async (tx) => {
          await bus.pubsub.publish(name, 'never', { tx })
          throw new Error('rolled back')
        }),
      ).rejects.toThrow('rolled back')
      await db.transaction().execute(async (tx) => {
        await bus.pubsub.publish(name, 'after', { tx })
      })
      expect(await coming).toEqual(['after'])
    } finally {
      await db.destroy()
      await stream.close()
    }
  })

  test('P14 a savepoint that is rolled back wakes to what is left; twenty transactions at once each wake', async () => {
    const name = fresh()
    const stream = await listening(name)
    await using caller = await rival(connectionString)
    const stays = waitingFor(stream, 1)
    await caller.query('begin; savepoint s')
    await bus.pubsub.publish(name, 'gone', { tx: caller })
    await caller.query('rollback to savepoint s')
    await bus.pubsub.publish(name, 'stays', { tx: caller })
    await caller.query('commit')
    expect(await stays).toEqual(['stays'])

    const callers = await Promise.all(Array.from({ length: 20 }, () => rival(connectionString)))
    await Promise.all(callers.map((client) => client.query('begin')))
    await Promise.all(callers.map((client, n) => bus.pubsub.publish(name, `${n}`, { tx: client })))
    for (const [n, client] of callers.entries()) {
      const coming = waitingFor(stream, 1)
      await client.query('commit')
      expect(await coming).toEqual([`${n}`])
    }
    await Promise.all(callers.map((client) => client[Symbol.asyncDispose]()))
    await stream.close()
  })

  test('P14 a caller’s transaction whose connection is terminated wakes nobody to nothing; the next wakes', async () => {
    const name = fresh()
    const stream = await listening(name)
    await using caller = await rival(connectionString)
    const coming = waitingFor(stream, 1)
    await caller.query('begin')
    await bus.pubsub.publish(name, 'lost', { tx: caller })
    await observer.query('select pg_terminate_backend($1)', [caller.pid])
    expect(await outcome(bus.pubsub.publish(name, 'too late', { tx: caller }))).toBe('connection')
    await using next = await rival(connectionString)
    await next.query('begin')
    await bus.pubsub.publish(name, 'next', { tx: next })
    await next.query('commit')
    expect(await coming).toEqual(['next'])
    await stream.close()
  })
})

describe('a listener that is lost', () => {
  test('P14 it is terminated again and again while others publish: every message comes without a poll', async () => {
    const name = fresh()
    const stream = await listening(name)
    let pid = await listenerPid()
    for (let round = 0; round < 8; round++) {
      const coming = waitingFor(stream, 10)
      const published = (async () => {
        for (let n = 0; n < 10; n++) await bus.pubsub.publish(name, `${round}-${n}`)
      })()
      await observer.query('select pg_terminate_backend($1)', [pid])
      await published
      expect(await coming).toEqual(Array.from({ length: 10 }, (_, n) => `${round}-${n}`))
      pid = await listenerPid(pid)
    }
    await stream.close()
  })

  test('P14 what commits in a caller’s transaction while nobody listens comes with the reconnect', async () => {
    const name = fresh()
    const stream = await listening(name)
    await using caller = await rival(connectionString)
    for (let round = 0; round < 4; round++) {
      const pid = await listenerPid()
      const coming = waitingFor(stream, 1)
      await caller.query('begin')
      await bus.pubsub.publish(name, `${round}`, { tx: caller })
      await Promise.all([observer.query('select pg_terminate_backend($1)', [pid]), caller.query('commit')])
      expect(await coming).toEqual([`${round}`])
      await listenerPid(pid)
    }
    await stream.close()
  })

  test('P14 claims, watches, leases and requests that wait are woken through it as well', async () => {
    const name = fresh()
    await using watch = await other.kv.watch(name, undefined, { updatesOnly: true })
    const changes = watch[Symbol.asyncIterator]()
    for (let round = 0; round < 4; round++) {
      const pid = await listenerPid()
      const lease = await bus.kv.lease(name, 'l', 60_000)
      const claim = other.jobs.claim(name, 'w', 60_000, { waitMs: 20_000 })
      const waiting = other.kv.lease(name, 'l', 60_000, { waitMs: 20_000 })
      const change = changes.next()
      await observer.query('select pg_terminate_backend($1)', [pid])
      await Promise.all([bus.kv.put(name, 'k', `${round}`), bus.jobs.enqueue(name, { payload: `${round}` }), lease.release()])
      const soon = AbortSignal.timeout(SOON_MS)
      const result = await Promise.race([
        Promise.all([claim, waiting, change]),
        new Promise<never>((_, reject) => soon.addEventListener('abort', () => reject(new Error('nobody was woken')), { once: true })),
      ])
      await result[0]!.ack()
      await result[1].release()
      await listenerPid(pid)
    }
  })
})

describe('what others send on the channel', () => {
  test('no notification, however odd, ends the process or the listening', async () => {
    const name = fresh()
    const stream = await listening(name)
    const odd = [
      'x',
      '{',
      'null',
      '[]',
      '{"from":"a","topics":"message"}',
      '{"from":"a","topics":[1]}',
      '{"from":"a","topics":[null]}',
      '{"from":"a","topics":[{}]}',
      '{"from":"a","topics":["message"]}',
      '{"from":"a","topics":["nothing:x","message:",":"]}',
      '{"from":"a","topics":["message:a..b","message:>","request:*.>"]}',
    ]
    const uncaught: unknown[] = []
    const note = (error: unknown) => void uncaught.push(error)
    const others = process.listeners('uncaughtException')
    process.removeAllListeners('uncaughtException')
    process.on('uncaughtException', note)
    try {
      for (const payload of odd) await observer.query('select pg_notify($1, $2)', [channelOf(schema), payload])
      await observer.query('select pg_notify($1, null)', [channelOf(schema)])
      await bus.pubsub.publish(name, 'after')
      expect(await take(stream, 1, SOON_MS)).toEqual(['after'])
    } finally {
      process.off('uncaughtException', note)
      for (const listener of others) process.on('uncaughtException', listener)
    }
    expect(uncaught).toEqual([])
    await stream.close()
  })
})

describe('a server of its own', () => {
  let server: EmbeddedPostgres

  beforeAll(async () => {
    server = await startEmbeddedPostgres({ settings: { max_prepared_transactions: '5' } })
  })

  afterAll(() => server.stop('immediate'))

  test('P1 P14 a prepared transaction: delivered when it is committed, across a restart of the server too, and once', async () => {
    const url = server.connectionString
    await using here = await PostgresBus.connect({ connectionString: url, pollIntervalMs: POLL_MS, maintenance: false })
    await using there = await PostgresBus.connect({ connectionString: url, pollIntervalMs: POLL_MS, maintenance: false })
    await using stream = await there.pubsub.subscribe('prepared', 'prepared')
    const taker = new Taker(stream)
    await here.pubsub.publish('prepared', 'first')
    await (await taker.expect(SOON_MS)).ack()
    {
      await using caller = await session(url)
      await caller.query('begin')
      await here.pubsub.publish('prepared', 'two phases', { tx: caller })
      await here.kv.put('prepared', 'k', 'v', { tx: caller })
      await caller.query(`prepare transaction 'one'`)
      await caller.query('begin')
      await here.pubsub.publish('prepared', 'across', { tx: caller })
      await caller.query(`prepare transaction 'two'`)
      await caller.query(`commit prepared 'one'`)
    }
    const message = await taker.expect(SOON_MS)
    expect(text(message.payload)).toBe('two phases')
    await message.ack()
    await server.kill()
    await server.restart()
    {
      await using caller = await session(url)
      await caller.query(`commit prepared 'two'`)
    }
    const across = await taker.expect(SOON_MS)
    expect([text(across.payload), across.attempt]).toEqual(['across', 1])
    await across.ack()
    await eventually(async () => expect(await outcome(here.pubsub.publish('prepared', 'last'))).toBe('ok'))
    expect(text((await taker.expect(SOON_MS)).payload)).toBe('last')
  })

  test('P14 the server is restarted under a stream, a watch and a claim: all go on within seconds, nothing is lost', async () => {
    const url = server.connectionString
    await using here = await PostgresBus.connect({ connectionString: url, pollIntervalMs: POLL_MS, maintenance: false })
    await using there = await PostgresBus.connect({ connectionString: url, pollIntervalMs: POLL_MS, maintenance: false })
    await using stream = await there.pubsub.subscribe('restarted', 'restarted')
    await using watch = await there.kv.watch('restarted')
    const changes = watch[Symbol.asyncIterator]()
    for (let round = 0; round < 3; round++) {
      const change = changes.next()
      if (round % 2 === 0) await server.kill()
      await server.restart()
      await eventually(async () => expect(await outcome(here.pubsub.publish('restarted', `${round}`))).toBe('ok'))
      await eventually(async () => expect(await outcome(here.kv.put('restarted', 'k', `${round}`))).toBe('ok'))
      const message = await nextMessage(stream, SOON_MS)
      expect(text(message.payload)).toBe(`${round}`)
      await message.ack()
      expect((await change).value).toMatchObject({ operation: 'put' })
    }
  })
})

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { BusError, PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import type { Session } from '../support/sessions.ts'
import { next, take, takeUntil, text } from './support/reading.ts'
import { rival } from './support/rival.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
/** What is held back stays so until the other transaction ends; the bound only has to be shorter, and roomy on a busy machine. */
const PROMPTLY_MS = 4_000
let bus: PostgresBus
let observer: Session

beforeAll(async () => {
  // The sessions here publish by SQL, which rings no bell: what they commit is found by the poll.
  bus = await PostgresBus.connect({ connectionString, schema, pollIntervalMs: 50 })
  observer = await rival(connectionString)
})

afterAll(async () => {
  await bus?.close()
  await observer?.[Symbol.asyncDispose]()
})

let names = 0
/** A subject of the test's own, and the stream of a durable on it. */
async function fresh() {
  const subject = `log.${++names}`
  const stream = await bus.pubsub.subscribe(subject, `log-${names}`)
  const publishIn = (client: Session, payload: string) =>
    client.query(`select ${schema}.publish($1, convert_to($2, 'UTF8'))`, [subject, payload])
  const publish = (payload: string) => bus.pubsub.publish(subject, payload)
  return { subject, durable: `log-${names}`, stream, publishIn, publish }
}

async function refused(promise: Promise<unknown>): Promise<BusError> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  )
  expect(error).toBeInstanceOf(BusError)
  return error as BusError
}

describe('commit order', () => {
  test('P9 a message that commits after a later one was read is delivered, and each once', async () => {
    const { stream, publish, publishIn } = await fresh()
    await using a = await rival(connectionString)
    await using b = await rival(connectionString)
    await a.query('begin')
    await publishIn(a, 'a')
    await b.query('begin')
    await publishIn(b, 'b')
    await b.query('commit')
    await publish('between')
    expect(await takeUntil(stream, 'between')).toEqual(['b'])
    await a.query('commit')
    expect(await take(stream, 1)).toEqual(['a'])
    await publish('end')
    expect(await takeUntil(stream, 'end')).toEqual([])
  })

  test('P9 a transaction that began earlier and published later, with the higher seq, hides nothing of the other', async () => {
    const { stream, publish, publishIn } = await fresh()
    await using a = await rival(connectionString)
    await using b = await rival(connectionString)
    await a.query('begin')
    await a.query('select pg_current_xact_id()')
    await b.query('begin')
    await b.query('select pg_current_xact_id()')
    await publishIn(b, 'b: lower seq, higher xid')
    await publishIn(a, 'a: higher seq, lower xid')
    await a.query('commit')
    await publish('between')
    expect(await takeUntil(stream, 'between')).toEqual(['a: higher seq, lower xid'])
    await b.query('commit')
    expect(await take(stream, 1)).toEqual(['b: lower seq, higher xid'])
    await publish('end')
    expect(await takeUntil(stream, 'end')).toEqual([])
  })

  test('P9 the same where the later transaction commits first: the earlier xid is below what was read', async () => {
    const { stream, publish, publishIn } = await fresh()
    await using a = await rival(connectionString)
    await using b = await rival(connectionString)
    await a.query('begin')
    await a.query('select pg_current_xact_id()')
    await b.query('begin')
    await publishIn(b, 'b')
    await publishIn(a, 'a')
    await b.query('commit')
    await publish('between')
    expect(await takeUntil(stream, 'between')).toEqual(['b'])
    await a.query('commit')
    expect(await take(stream, 1)).toEqual(['a'])
    await publish('end')
    expect(await takeUntil(stream, 'end')).toEqual([])
  })

  test('P9 twenty transactions that commit in the opposite order of their beginning, a read after each, lose and double nothing', async () => {
    const { stream, publish, publishIn } = await fresh()
    const sessions = await Promise.all(Array.from({ length: 20 }, () => rival(connectionString)))
    try {
      for (const [n, client] of sessions.entries()) {
        await client.query('begin')
        await publishIn(client, `${n}`)
      }
      for (const [n, client] of [...sessions.entries()].reverse()) {
        await client.query('commit')
        await publish(`after ${n}`)
        expect(await takeUntil(stream, `after ${n}`)).toEqual([`${n}`])
      }
    } finally {
      await Promise.all(sessions.map((client) => client[Symbol.asyncDispose]()))
    }
  })

  test('P9 two messages of one transaction around another one that commits between them come together, in publish order', async () => {
    const { stream, publish, publishIn } = await fresh()
    await using a = await rival(connectionString)
    await a.query('begin')
    await publishIn(a, 'a1')
    await publish('b')
    expect(await take(stream, 1)).toEqual(['b'])
    await publishIn(a, 'a2')
    await publish('c')
    expect(await takeUntil(stream, 'c')).toEqual([])
    await a.query('commit')
    expect(await take(stream, 2)).toEqual(['a1', 'a2'])
  })
})

describe('open transactions', () => {
  test('P9 a publish held open while 1,000 others commit: the 1,000 arrive at once, the late one after its commit', async () => {
    const { stream, publish, publishIn, subject } = await fresh()
    await using late = await rival(connectionString)
    await late.query('begin')
    await publishIn(late, 'late')
    await Promise.all(Array.from({ length: 1_000 }, (_, n) => publish(`${n}`)))
    const resolvedAt = performance.now()
    const arrived = await take(stream, 1_000)
    const tookMs = performance.now() - resolvedAt
    expect(new Set(arrived).size).toBe(1_000)
    expect(arrived).not.toContain('late')
    expect(tookMs).toBeLessThan(PROMPTLY_MS)
    // Still open, and nothing is held back by it now either.
    await bus.pubsub.publish(subject, 'still flowing')
    expect(await takeUntil(stream, 'still flowing')).toEqual([])
    await late.query('commit')
    expect(await take(stream, 1)).toEqual(['late'])
    await publish('end')
    expect(await takeUntil(stream, 'end')).toEqual([])
  })

  test('P1 P9 a publish in a caller’s transaction that commits after 5 seconds comes then, and delays nobody', async () => {
    const { stream, publish, subject } = await fresh()
    await using caller = await rival(connectionString)
    await caller.query('begin')
    await bus.pubsub.publish(subject, 'held for 5 s', { tx: caller })
    let slowestMs = 0
    const until = performance.now() + 5_000
    for (let n = 0; performance.now() < until; n++) {
      const sentAt = performance.now()
      await publish(`${n}`)
      expect(await takeUntil(stream, `${n}`)).toEqual([])
      slowestMs = Math.max(slowestMs, performance.now() - sentAt)
    }
    expect(slowestMs).toBeLessThan(PROMPTLY_MS)
    await caller.query('commit')
    expect(await take(stream, 1)).toEqual(['held for 5 s'])
  })

  test('P9 a write transaction open in another database delays nothing: 100 messages come while it is open', async () => {
    const { stream, publish } = await fresh()
    const database = freshSchema()
    await observer.query(`create database ${database}`)
    try {
      const elsewhere = new URL(connectionString)
      elsewhere.pathname = `/${database}`
      await using stranger = await rival(elsewhere.href)
      await stranger.query('begin')
      await stranger.query('create table held (n int)')
      const begunAt = performance.now()
      await Promise.all(Array.from({ length: 100 }, (_, n) => publish(`${n}`)))
      expect((await take(stream, 100)).length).toBe(100)
      expect(performance.now() - begunAt).toBeLessThan(PROMPTLY_MS)
      await stranger.query('rollback')
    } finally {
      await observer.query(`drop database ${database}`)
    }
  })

  test('P9 neither does one in the same database that wrote elsewhere, locked rows of the bus’s tables or reads with an old snapshot', async () => {
    const { stream, publish } = await fresh()
    await using writer = await rival(connectionString)
    await using reader = await rival(connectionString)
    await writer.query('begin')
    await writer.query('create temp table held (n int)')
    await reader.query('begin isolation level repeatable read')
    await reader.query(`select count(*) from ${schema}.messages`)
    await publish('before the lock')
    expect(await take(stream, 1)).toEqual(['before the lock'])
    await writer.query(`select from ${schema}.messages for share`)
    const begunAt = performance.now()
    await Promise.all(Array.from({ length: 100 }, (_, n) => publish(`${n}`)))
    expect((await take(stream, 100)).length).toBe(100)
    expect(performance.now() - begunAt).toBeLessThan(PROMPTLY_MS)
    await writer.query('rollback')
    await reader.query('rollback')
  })
})

describe('transactions and savepoints', () => {
  test('P1 what is rolled back is never delivered, nor what a savepoint undid; what a kept savepoint published is', async () => {
    const { stream, publish, publishIn, subject } = await fresh()
    await using client = await rival(connectionString)
    await client.query('begin')
    await publishIn(client, 'rolled back')
    await bus.pubsub.publish(subject, 'rolled back too', { tx: client })
    await client.query('rollback')

    await client.query('begin')
    await publishIn(client, 'before')
    await client.query('savepoint one')
    await publishIn(client, 'undone')
    await client.query('savepoint two')
    await publishIn(client, 'undone with it')
    await client.query('rollback to one')
    await publishIn(client, 'in the savepoint')
    await client.query('release one')
    await client.query('savepoint three')
    await publishIn(client, 'in a savepoint that nobody released')
    await client.query('commit')
    await publish('end')
    expect(await takeUntil(stream, 'end')).toEqual(['before', 'in the savepoint', 'in a savepoint that nobody released'])
  })

  test('P9 a savepoint’s message carries the xid of its transaction: read before and after the commit, it comes once', async () => {
    const { stream, publish, publishIn } = await fresh()
    await using client = await rival(connectionString)
    await client.query('begin')
    await client.query('savepoint one')
    await publishIn(client, 'first')
    await client.query('release one')
    await publish('between')
    expect(await takeUntil(stream, 'between')).toEqual([])
    await client.query('savepoint two')
    await publishIn(client, 'second')
    await client.query('commit')
    expect(await take(stream, 2)).toEqual(['first', 'second'])
    await publish('end')
    expect(await takeUntil(stream, 'end')).toEqual([])
  })

  test('P1 a process that dies with its transaction open leaves no message', async () => {
    const { stream, publish, publishIn } = await fresh()
    const client = await rival(connectionString)
    await client.query('begin')
    await publishIn(client, 'never committed')
    await observer.query('select pg_terminate_backend($1)', [client.pid])
    await client[Symbol.asyncDispose]()
    await publish('end')
    expect(await takeUntil(stream, 'end')).toEqual([])
  })
})

describe('starting a durable', () => {
  test('P4 deliver-all gets exactly all, and new what commits after subscribe resolved, while 50 publishers run', async () => {
    const subject = `log.${++names}`
    let running = true
    const published: { text: string; sentAfter: number }[] = []
    let subscribed = 0
    const publishers = Array.from({ length: 50 }, async (_, publisher) => {
      for (let n = 0; running; n++) {
        const sentAfter = subscribed
        await bus.pubsub.publish(subject, `${publisher}.${n}`)
        published.push({ text: `${publisher}.${n}`, sentAfter })
      }
    })
    const rounds = [1, 2, 3, 4, 5]
    await using slow = await rival(connectionString)
    for (const round of rounds) {
      // Open while the durables are made, committed afterwards: both must get it.
      await slow.query('begin')
      await slow.query(`select ${schema}.publish($1, $2)`, [subject, Buffer.from(`straggler.${round}`)])
      const [all, fresh_] = await Promise.all([
        bus.pubsub.subscribe(subject, `all-${names}-${round}`),
        bus.pubsub.subscribe(subject, `new-${names}-${round}`, { start: 'new' }),
      ])
      subscribed = round
      await slow.query('commit')
      await Promise.all([all.close(), fresh_.close()])
    }
    running = false
    await Promise.all(publishers)
    await bus.pubsub.publish(subject, 'end')
    const stragglers = rounds.map((round) => `straggler.${round}`)
    const everything = new Set([...published.map((p) => p.text), ...stragglers])
    for (const round of rounds) {
      const all = await bus.pubsub.subscribe(subject, `all-${names}-${round}`)
      const got = await takeUntil(all, 'end', 20_000)
      expect(got.length).toBe(everything.size)
      expect(new Set(got)).toEqual(everything)
      await all.close()
      const fresh_ = await bus.pubsub.subscribe(subject, `new-${names}-${round}`)
      const news = await takeUntil(fresh_, 'end', 20_000)
      expect(new Set(news).size).toBe(news.length)
      const expected = [...published.filter((p) => p.sentAfter >= round).map((p) => p.text), ...stragglers.slice(round - 1)]
      expect(expected.filter((one) => !new Set(news).has(one))).toEqual([])
      await fresh_.close()
    }
  }, 60_000)
})

describe('filters', () => {
  test('P11 another filter is refused with conflict, changes nothing, and the position stays', async () => {
    const { stream, publish, subject, durable } = await fresh()
    await publish('one')
    await publish('two')
    const one = await next(stream)
    await one.ack()
    const error = await refused(bus.pubsub.subscribe('log.>', durable))
    expect(error.code).toBe('conflict')
    expect(error.message).toContain(subject)
    await stream.close()
    await using again = await bus.pubsub.subscribe(subject, durable)
    expect(text(await next(again))).toBe('two')
  })

  test('P3 one match in 100,000 is found: each fetch is bounded, and together they walk the log', async () => {
    const haystack = `hay-${++names}`
    await observer.query(
      `with hay as (
         select array_agg(case when n = 90000 then $1 || '.needle' else $1 || '.hay' end order by n) as subjects,
           array_agg(1) as starts, array_agg(1) as lengths
         from generate_series(1, 100000) n
       )
       select count(*) from hay, ${schema}.publish_many(subjects, 'x', starts, lengths, null, null)`,
      [haystack],
    )
    await (await bus.pubsub.subscribe(`${haystack}.needle`, `${haystack}-bounded`)).close()
    // By hand first: no single statement may read the log from end to end.
    const { rows } = await observer.query(`select id from ${schema}.consumer_offsets where durable = $1`, [`${haystack}-bounded`])
    const consumer = (rows[0] as { id: number }).id
    let fetches = 0
    let found = 0
    for (let more = true; more && found === 0; fetches++) {
      const startedAt = performance.now()
      const fetched = await observer.query(`select seq, more from ${schema}.fetch_messages($1, 16, 30000, 1000, null, 1000000)`, [consumer])
      expect(performance.now() - startedAt).toBeLessThan(1_500)
      found += fetched.rows.length - 1
      more = (fetched.rows.at(-1) as { more: boolean }).more
    }
    expect(found).toBe(1)
    expect(fetches).toBeGreaterThan(10)
    // And through a stream of another durable, beside traffic.
    await using other = await bus.pubsub.subscribe(`${haystack}.needle`, `${haystack}-stream`)
    const needle = next(other, 20_000)
    await bus.pubsub.publish('elsewhere', 'traffic')
    const message = await needle
    expect(message.subject).toBe(`${haystack}.needle`)
    await message.ack()
  }, 60_000)
})

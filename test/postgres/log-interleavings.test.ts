/**
 * Two and more sessions in the middle of a fetch, its steps held by locks and open transactions, never by time: the row of
 * the durable is locked before the snapshot is taken, and these tests stand between the two.
 */

import { randomBytes } from 'node:crypto'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, untilBlocked } from '../support/sessions.ts'
import { ackIn, type Fetched, fetchIn } from './support/fetching.ts'
import { randomFrom } from './support/random.ts'
import { rival } from './support/rival.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
const SUBJECT = 'interleaved'
let bus: PostgresBus
let observer: Session
let durable: string
let names = 0

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
  observer = await rival(connectionString)
})

afterAll(async () => {
  await bus?.close()
  await observer?.[Symbol.asyncDispose]()
})

/** A durable that begins with what comes. */
async function freshDurable(): Promise<void> {
  durable = `interleaved-${++names}`
  await (await bus.pubsub.subscribe(SUBJECT, durable, { start: 'new' })).close()
}

const publishIn = (client: Session, text: string) => client.query(`select ${schema}.publish($1, convert_to($2, 'UTF8'))`, [SUBJECT, text])
const fetch = (client: Session, maxMessages = 100) => fetchIn(client, schema, durable, { maxMessages })
const texts = (fetched: readonly Fetched[]) => fetched.map(({ text }) => text)

async function sqlState(promise: Promise<unknown>): Promise<string | undefined> {
  return promise.then(
    () => undefined,
    (error: { code?: string }) => error.code,
  )
}

describe('two fetchers of one durable', () => {
  test('P3 one that waits for the other’s lock, a message committing meanwhile, repeats nothing and moves the cursor forward', async () => {
    await freshDurable()
    await using one = await rival(connectionString)
    await using two = await rival(connectionString)
    await publishIn(observer, 'm1')
    await one.query('begin')
    expect(texts(await fetch(one))).toEqual(['m1'])
    // It has looked before it waits: what it saw then is out of date when the lock comes.
    const waiting = fetch(two)
    await untilBlocked(observer, two.pid)
    await publishIn(observer, 'm2')
    await one.query('commit')
    expect(texts(await waiting)).toEqual(['m2'])
    expect(texts(await fetch(one))).toEqual([])
    await publishIn(observer, 'm3')
    expect(texts(await fetch(two))).toEqual(['m3'])
  })

  test('P3 one that waits behind a fetch that fails gets what that one had taken', async () => {
    await freshDurable()
    await using one = await rival(connectionString)
    await using two = await rival(connectionString)
    await publishIn(observer, 'm1')
    await one.query('begin')
    expect(texts(await fetch(one))).toEqual(['m1'])
    const waiting = fetch(two)
    await untilBlocked(observer, two.pid)
    await publishIn(observer, 'm2')
    await one.query('rollback')
    const got = await waiting
    expect(texts(got)).toEqual(['m1', 'm2'])
    expect(got.map(({ attempt }) => attempt)).toEqual([1, 1])
    expect(texts(await fetch(one))).toEqual([])
  })

  test('P9 three that wait in a row while transactions end in every order share what is committed, and a straggler comes last', async () => {
    await freshDurable()
    await using holder = await rival(connectionString)
    await using early = await rival(connectionString)
    await using straggler = await rival(connectionString)
    const fetchers = await Promise.all([rival(connectionString), rival(connectionString), rival(connectionString)])
    try {
      await early.query('begin')
      await publishIn(early, 'early')
      await straggler.query('begin')
      await publishIn(straggler, 'straggler')
      await publishIn(observer, 'm1')
      await holder.query('begin')
      await holder.query(`select from ${schema}.consumer_offsets where durable = $1 for update`, [durable])
      const waiting: Promise<Fetched[]>[] = []
      for (const [n, fetcher] of fetchers.entries()) {
        // Each looks at another snapshot before it waits.
        waiting.push(fetch(fetcher, 1))
        await untilBlocked(observer, fetcher.pid)
        await publishIn(observer, `while ${n} waits`)
      }
      await early.query('commit')
      await holder.query('rollback')
      const got = (await Promise.all(waiting)).flatMap(texts)
      const rest = texts(await fetch(observer))
      expect([...got, ...rest].sort()).toEqual(['early', 'm1', 'while 0 waits', 'while 1 waits', 'while 2 waits'])
      expect(got.length).toBe(3)
      await straggler.query('commit')
      expect(texts(await fetch(observer))).toEqual(['straggler'])
      expect(texts(await fetch(observer))).toEqual([])
    } finally {
      await Promise.all(fetchers.map((client) => client[Symbol.asyncDispose]()))
    }
  })

  test('P9 a window that is read page by page is not widened: what commits meanwhile comes after it, and once', async () => {
    await freshDurable()
    await using open = await rival(connectionString)
    await open.query('begin')
    await publishIn(open, 'open')
    for (let n = 0; n < 5; n++) await publishIn(observer, `m${n}`)
    expect(texts(await fetch(observer, 2))).toEqual(['m0', 'm1'])
    // Its xid is below the position of the page, and it was running when the window was opened.
    await open.query('commit')
    await publishIn(observer, 'new')
    expect(texts(await fetch(observer, 2))).toEqual(['m2', 'm3'])
    expect(texts(await fetch(observer, 2))).toEqual(['m4'])
    expect(texts(await fetch(observer, 2))).toEqual(['open', 'new'])
    expect(texts(await fetch(observer, 2))).toEqual([])
  })

  test('P9 a durable deleted under a waiting fetch ends it, and one made anew under the same name starts over', async () => {
    await freshDurable()
    await using one = await rival(connectionString)
    await using two = await rival(connectionString)
    await publishIn(observer, 'm1')
    await one.query('begin')
    await one.query(`delete from ${schema}.consumer_offsets where durable = $1`, [durable])
    const waiting = sqlState(fetch(two))
    await untilBlocked(observer, two.pid)
    await one.query('commit')
    expect(await waiting).toBe('KB001')
    await using stream = await bus.pubsub.subscribe(SUBJECT, durable)
    await publishIn(observer, 'since it was made anew')
    const got = texts(await fetch(observer, 1_000))
    expect(got.filter((text) => text === 'since it was made anew').length).toBe(1)
    await stream.close()
  })
})

describe('a fetch in somebody’s transaction', () => {
  test('J7 it is refused once the transaction has written, in a savepoint too, and nothing is handed out', async () => {
    await freshDurable()
    await publishIn(observer, 'm1')
    await using caller = await rival(connectionString)
    await caller.query('begin')
    await publishIn(caller, 'mine')
    expect(await sqlState(fetch(caller))).toBe('KB002')
    await caller.query('rollback')
    await caller.query('begin')
    await caller.query('savepoint one')
    await caller.query('create temp table written (n int)')
    await caller.query('rollback to one')
    expect(await sqlState(fetch(caller))).toBe('KB002')
    await caller.query('rollback')
    expect(texts(await fetch(observer))).toEqual(['m1'])
  })

  test('P9 it is refused under a snapshot that stands still', async () => {
    await freshDurable()
    await publishIn(observer, 'm1')
    await using caller = await rival(connectionString)
    for (const isolation of ['repeatable read', 'serializable']) {
      await caller.query(`begin isolation level ${isolation}`)
      expect(await sqlState(fetch(caller))).toBe('KB003')
      await caller.query('rollback')
    }
    expect(texts(await fetch(observer))).toEqual(['m1'])
  })

  test('P9 what a transaction publishes after it fetched is delivered, though its xid looks finished in its own snapshot', async () => {
    await freshDurable()
    await publishIn(observer, 'm1')
    expect(texts(await fetchIn(observer, schema, durable, { ackWaitMs: 0 }))).toEqual(['m1'])
    await publishIn(observer, 'm2')
    await using caller = await rival(connectionString)
    await using holder = await rival(connectionString)
    // The update of a redelivery comes after the lock, which draws the xid, and before the snapshot: there it is held.
    await observer.query(
      `create function ${schema}.test_hold() returns trigger language plpgsql as
         $$ begin perform pg_advisory_xact_lock_shared(hashtext('${schema}')); return null; end $$;
       create trigger test_hold before update on ${schema}.deliveries execute function ${schema}.test_hold()`,
    )
    try {
      await holder.query('select pg_advisory_lock(hashtext($1))', [schema])
      await caller.query('begin')
      const fetching = fetch(caller)
      await untilBlocked(observer, caller.pid)
      // A later xid ends.
      await observer.query('select pg_current_xact_id()')
      await holder.query('select pg_advisory_unlock(hashtext($1))', [schema])
      expect(texts(await fetching)).toEqual(['m1', 'm2'])
      await publishIn(caller, 'after the fetch')
      await caller.query('commit')
    } finally {
      await observer.query(`drop trigger test_hold on ${schema}.deliveries; drop function ${schema}.test_hold()`)
    }
    expect(texts(await fetch(observer))).toEqual(['after the fetch'])
  })
})

describe('any interleaving', () => {
  const seed = process.env.KLIEO_TEST_SEED ?? randomBytes(4).toString('hex')

  test(`P9 random steps of publishers and fetchers lose nothing and hand nothing out twice (KLIEO_TEST_SEED=${seed})`, async () => {
    await freshDurable()
    const random = randomFrom(seed)
    const below = (n: number) => Math.floor(random() * n)
    const publishers = await Promise.all(Array.from({ length: 6 }, () => rival(connectionString)))
    const fetchers = await Promise.all(Array.from({ length: 3 }, () => rival(connectionString)))
    const open = new Map<Session, { texts: string[]; savepoint: string[] | undefined }>()
    const committed = new Set<string>()
    const first: string[] = []
    const acked: string[] = []
    let holding: { client: Session; fetched: Fetched[] } | undefined
    const unsettled: Fetched[] = []
    let sent = 0

    const keep = (fetched: readonly Fetched[]) => {
      for (const delivery of fetched) if (delivery.attempt === 1) first.push(delivery.text)
      unsettled.push(...fetched)
    }
    const publisherStep = async (client: Session) => {
      const tx = open.get(client)
      if (!tx) {
        await client.query('begin')
        if (random() < 0.3) await client.query('select pg_current_xact_id()')
        open.set(client, { texts: [], savepoint: undefined })
        return
      }
      const choice = random()
      if (choice < 0.45) {
        const text = `m${++sent}`
        await publishIn(client, text)
        ;(tx.savepoint ?? tx.texts).push(text)
      } else if (choice < 0.6) {
        if (tx.savepoint === undefined) {
          await client.query('savepoint s')
          tx.savepoint = []
        } else if (random() < 0.5) {
          await client.query('release s')
          tx.texts.push(...tx.savepoint)
          tx.savepoint = undefined
        } else {
          await client.query('rollback to s')
          tx.savepoint = []
        }
      } else if (choice < 0.9) {
        await client.query('commit')
        for (const text of [...tx.texts, ...(tx.savepoint ?? [])]) committed.add(text)
        open.delete(client)
      } else {
        await client.query('rollback')
        open.delete(client)
      }
    }
    const fetcherStep = async () => {
      const maxMessages = 1 + below(4)
      if (holding) {
        const { client, fetched } = holding
        holding = undefined
        // Another waits for the lock, and goes on from whatever this one leaves behind.
        const other = fetchers.find((fetcher) => fetcher !== client) as Session
        const waiting = random() < 0.5 ? fetchIn(other, schema, durable, { maxMessages }) : undefined
        if (waiting && fetched.length > 0) {
          await untilBlocked(observer, other.pid).catch(() => {})
          await publisherStep(publishers[below(publishers.length)] as Session)
        }
        if (random() < 0.7) {
          await client.query('commit')
          keep(fetched)
        } else await client.query('rollback')
        if (waiting) keep(await waiting)
      } else if (random() < 0.4) {
        const client = fetchers[below(fetchers.length)] as Session
        await client.query('begin')
        holding = { client, fetched: await fetchIn(client, schema, durable, { maxMessages }) }
      } else {
        // A short ack wait now and then: what is left lying comes again.
        const ackWaitMs = random() < 0.2 ? 1 : 60_000
        keep(await fetchIn(fetchers[below(fetchers.length)] as Session, schema, durable, { maxMessages, ackWaitMs }))
      }
    }

    try {
      for (let step = 0; step < 2_500; step++) {
        const choice = random()
        if (choice < 0.65) await publisherStep(publishers[below(publishers.length)] as Session)
        else if (choice < 0.9 || unsettled.length === 0) await fetcherStep()
        else if (!holding) {
          const batch = unsettled.splice(0, 1 + below(unsettled.length))
          acked.push(...texts(await ackIn(observer, schema, durable, batch)))
        }
      }
      if (holding) {
        await holding.client.query('commit')
        keep(holding.fetched)
        holding = undefined
      }
      for (const [client, tx] of open) {
        await client.query('commit')
        for (const text of [...tx.texts, ...(tx.savepoint ?? [])]) committed.add(text)
      }
      // Everything is committed: what is left comes without another publish.
      for (let pending = 1, rounds = 0; pending > 0 && rounds < 1_000; rounds++) {
        keep(await fetchIn(observer, schema, durable, { maxMessages: 50 }))
        const { rows } = await observer.query<{ pending: string }>(`select pending from ${schema}.consumer_stats where durable = $1`, [
          durable,
        ])
        pending = Number(rows[0]?.pending)
      }
      acked.push(...texts(await ackIn(observer, schema, durable, unsettled)))
    } finally {
      await Promise.all([...publishers, ...fetchers].map((client) => client[Symbol.asyncDispose]()))
    }
    const counted = (list: readonly string[]) => [...list].sort()
    expect(committed.size).toBeGreaterThan(200)
    expect(counted(first)).toEqual(counted([...committed]))
    expect(counted(acked)).toEqual(counted([...committed]))
  }, 60_000)
})

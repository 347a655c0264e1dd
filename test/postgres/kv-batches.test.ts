/** Concurrent calls on keys go out together: what a lock, a race or a bad call among them does to the others. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import type { Session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { outcome } from './support/outcome.ts'
import { rival } from './support/rival.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
const BUCKET = 'batches'

let bus: PostgresBus
let other: PostgresBus
let observer: Session
let keys = 0

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
  other = await PostgresBus.connect({ connectionString, schema, maintenance: false })
  observer = await rival(connectionString)
})

afterAll(async () => {
  await Promise.all([bus.close(), other.close()])
  await observer.query(`drop schema ${schema} cascade`)
  await observer[Symbol.asyncDispose]()
})

const freshKey = () => `k${++keys}`
const freshKeys = (count: number) => Array.from({ length: count }, freshKey)
const text = async (key: string) => {
  const entry = await other.kv.get(BUCKET, key)
  return entry && new TextDecoder().decode(entry.value)
}

/** Statements of the bus that wait for a lock now. */
async function blocked(): Promise<number> {
  const { rows } = await observer.query(
    `select count(*)::int as n from pg_stat_activity where wait_event_type = 'Lock' and query like '%' || $1 || '%' and pid <> pg_backend_pid()`,
    [schema],
  )
  return (rows[0] as { n: number }).n
}

const untilBlocked = () => eventually(async () => (await blocked()) > 0, { everyMs: 5, what: 'a statement that waits for a lock' })

/** In which transaction each of the keys was written last. */
async function transactions(written: readonly string[]): Promise<string[]> {
  const { rows } = await observer.query(`select distinct tx::text as tx from ${schema}.kv_entries where bucket = $1 and key = any ($2)`, [
    BUCKET,
    written,
  ])
  return (rows as { tx: string }[]).map(({ tx }) => tx)
}

describe('what is asked for at once', () => {
  test('K4 puts of one moment share a transaction, and gets that follow see each of them', async () => {
    const many = freshKeys(40)
    await Promise.all(many.map((key) => bus.kv.put(BUCKET, key, key)))
    expect(await transactions(many)).toHaveLength(1)
    expect(await Promise.all(many.map(text))).toEqual(many)
  })

  test('K4 a get that begins after a put has resolved sees it, while others put and get the same key', async () => {
    const key = freshKey()
    let newest = 0
    const writers = Array.from({ length: 8 }, async () => {
      for (let n = 0; n < 20; n++) newest = Math.max(newest, await bus.kv.put(BUCKET, key, `${n}`))
    })
    const readers = Array.from({ length: 8 }, async () => {
      for (let n = 0; n < 40; n++) {
        const known = newest
        expect((await bus.kv.get(BUCKET, key))?.revision ?? 0).toBeGreaterThanOrEqual(known)
      }
    })
    await Promise.all([...writers, ...readers])
  })

  test('K1 K2 K3 writes of one key in one batch are made one after the other, in the order of the calls', async () => {
    const key = freshKey()
    const first = await bus.kv.put(BUCKET, key, 'first')
    await using watch = await other.kv.watch(BUCKET, key, { updatesOnly: true })
    const [a, lost, won, , created, tooLate] = await Promise.allSettled([
      bus.kv.put(BUCKET, key, 'a'),
      bus.kv.cas(BUCKET, key, 'b', first),
      bus.kv.put(BUCKET, key, 'c'),
      bus.kv.delete(BUCKET, key),
      bus.kv.cas(BUCKET, key, 'd', null),
      bus.kv.cas(BUCKET, key, 'e', null),
    ])
    if (a.status !== 'fulfilled' || won.status !== 'fulfilled' || created.status !== 'fulfilled') throw new Error('a write was refused')
    expect(lost).toMatchObject({ status: 'rejected', reason: { code: 'cas_conflict', expected: first, actual: a.value } })
    expect(tooLate).toMatchObject({ status: 'rejected', reason: { code: 'cas_conflict', expected: null, actual: created.value } })
    expect([first, a.value, won.value, created.value]).toEqual([first, a.value, won.value, created.value].sort((x, y) => x - y))
    expect(await text(key)).toBe('d')
    const seen: string[] = []
    for await (const change of watch) {
      seen.push(change.operation === 'put' ? new TextDecoder().decode(change.entry.value) : 'deleted')
      if (seen.length === 4) break
    }
    expect(seen).toEqual(['a', 'c', 'deleted', 'd'])
  })

  test('K2 a cas with a stale expectation is refused alone', async () => {
    const many = freshKeys(20)
    const revisions = await Promise.all(many.map((key) => bus.kv.put(BUCKET, key, 'a')))
    const newest = await other.kv.put(BUCKET, many[7] as string, 'meanwhile')
    const results = await Promise.allSettled(many.map((key, n) => bus.kv.cas(BUCKET, key, 'b', revisions[n] as number)))
    for (const [n, result] of results.entries()) {
      if (n !== 7) expect(result.status).toBe('fulfilled')
      else expect(result).toMatchObject({ reason: { code: 'cas_conflict', expected: revisions[7], actual: newest } })
    }
    expect(await text(many[7] as string)).toBe('meanwhile')
    expect(await text(many[8] as string)).toBe('b')
  })

  test('a call that the server refuses is refused alone', async () => {
    const many = freshKeys(10)
    await observer.query(`alter table ${schema}.kv_entries add constraint never check (key <> '${many[3]}')`)
    const results = await Promise.all(many.map((key) => outcome(bus.kv.put(BUCKET, key, 'a'))))
    expect(results).toEqual(many.map((_, n) => (n === 3 ? 'invalid_argument' : 'ok')))
  })

  test('K2 increments by cas of 32 callers in two buses come to the exact sum', async () => {
    const key = freshKey()
    const CALLERS = 32
    const EACH = 5
    await Promise.all(
      Array.from({ length: CALLERS }, async (_, caller) => {
        const own = caller % 2 ? bus : other
        for (let n = 0; n < EACH; n++) {
          for (;;) {
            const entry = await own.kv.get(BUCKET, key)
            const count = entry ? Number(new TextDecoder().decode(entry.value)) : 0
            if ((await outcome(own.kv.cas(BUCKET, key, `${count + 1}`, entry?.revision ?? null))) === 'ok') break
          }
        }
      }),
    )
    expect(await text(key)).toBe(String(CALLERS * EACH))
  })

  test('gets of more than one answer carries are all answered', async () => {
    const many = freshKeys(12)
    await Promise.all(many.map((key, n) => bus.kv.put(BUCKET, key, new Uint8Array(1024 * 1024).fill(n))))
    const entries = await Promise.all([...many, 'absent'].map((key) => bus.kv.get(BUCKET, key)))
    expect(entries.map((entry) => entry && [entry.value.byteLength, entry.value[0]])).toEqual([
      ...many.map((_, n) => [1024 * 1024, n]),
      null,
    ])
  })

  test('K1 an entry with a ttl runs out, whatever it is written together with', async () => {
    const [lasting, passing] = [freshKey(), freshKey()]
    await Promise.all([bus.kv.put(BUCKET, lasting, 'a'), bus.kv.put(BUCKET, passing, 'a', { ttlMs: 100_000 })])
    await Promise.all([bus.kv.put(BUCKET, lasting, 'b', { ttlMs: 50 }), bus.kv.put(BUCKET, passing, 'b')])
    await eventually(async () => (await text(lasting)) === null, { everyMs: 5, what: 'the end of the entry' })
    const { rows } = await observer.query(`select expires_at from ${schema}.kv_entries where bucket = $1 and key = $2`, [BUCKET, passing])
    expect(rows).toEqual([{ expires_at: null }])
  })
})

describe('beside an open transaction', () => {
  test.each(['put', 'cas', 'delete'] as const)('a %s of a key that it holds waits, and nothing else does', async (way) => {
    const many = freshKeys(20)
    const held = many[5] as string
    const revisions = await Promise.all(many.map((key) => bus.kv.put(BUCKET, key, 'old')))
    const write = (key: string, n: number) => {
      if (way === 'put') return bus.kv.put(BUCKET, key, 'new')
      return way === 'cas' ? bus.kv.cas(BUCKET, key, 'new', revisions[n] as number) : bus.kv.delete(BUCKET, key)
    }
    await using holder = await rival(connectionString)
    await holder.query('begin')
    await holder.query(`select from ${schema}.kv_entries where bucket = $1 and key = $2 for update`, [BUCKET, held])
    const writes = many.map(write)
    await Promise.all(writes.filter((_, n) => n !== 5))
    await untilBlocked()
    // Nor is what comes later held up: the key is known to be locked.
    const later = bus.kv.put(BUCKET, held, 'later')
    const before = performance.now()
    await bus.kv.put(BUCKET, freshKey(), 'x')
    expect(performance.now() - before).toBeLessThan(5_000)
    expect(await text(held)).toBe('old')
    await holder.query('commit')
    const [revision, laterRevision] = await Promise.all([writes[5], later])
    if (way !== 'delete') expect(laterRevision).toBeGreaterThan(revision as number)
    expect(await text(held)).toBe('later')
  })

  test('a put of a key that it has inserted waits, and nothing else does', async () => {
    const many = freshKeys(20)
    const held = many[5] as string
    await using holder = await rival(connectionString)
    await holder.query('begin')
    const inserted = await bus.kv.put(BUCKET, held, 'holder', { tx: holder })
    const writes = many.map((key) => bus.kv.put(BUCKET, key, 'new'))
    await Promise.all(writes.filter((_, n) => n !== 5))
    await untilBlocked()
    expect(await text(held)).toBeNull()
    await holder.query('commit')
    expect(await writes[5]).toBeGreaterThan(inserted)
    expect(await text(held)).toBe('new')
  })

  test('K2 a cas behind a transaction that changes the key is refused once that commits, with what is there then', async () => {
    const [key, free] = [freshKey(), freshKey()]
    const old = await bus.kv.put(BUCKET, key, 'old')
    await using holder = await rival(connectionString)
    await holder.query('begin')
    const actual = await other.kv.put(BUCKET, key, 'holder', { tx: holder })
    const cas = outcome(bus.kv.cas(BUCKET, key, 'new', old))
    const refused = expect(bus.kv.cas(BUCKET, key, 'new', old)).rejects.toMatchObject({ code: 'cas_conflict', expected: old, actual })
    await bus.kv.put(BUCKET, free, 'x')
    await untilBlocked()
    await holder.query('commit')
    expect(await cas).toBe('cas_conflict')
    await refused
  })

  test('K2 a cas behind a transaction that rolls back wins', async () => {
    const [key, free] = [freshKey(), freshKey()]
    const old = await bus.kv.put(BUCKET, key, 'old')
    await using holder = await rival(connectionString)
    await holder.query('begin')
    await other.kv.put(BUCKET, key, 'holder', { tx: holder })
    const cas = bus.kv.cas(BUCKET, key, 'new', old)
    await bus.kv.put(BUCKET, free, 'x')
    await untilBlocked()
    await holder.query('rollback')
    expect(await cas).toBeGreaterThan(old)
  })

  test('a get does not wait for it', async () => {
    const key = freshKey()
    await bus.kv.put(BUCKET, key, 'old')
    await using holder = await rival(connectionString)
    await holder.query('begin')
    await bus.kv.put(BUCKET, key, 'holder', { tx: holder })
    expect(await text(key)).toBe('old')
    await holder.query('rollback')
  })
})

describe('two processes', () => {
  test('batches over the same keys in other orders all succeed, the absent keys included', async () => {
    for (let round = 0; round < 10; round++) {
      const many = freshKeys(60)
      const shuffled = (salt: number) => many.toSorted((a, b) => ((Number(a.slice(1)) * salt) % 61) - ((Number(b.slice(1)) * salt) % 61))
      const outcomes = await Promise.all(
        [7, 11, 13, 17].flatMap((salt, n) => shuffled(salt).map((key) => outcome((n % 2 ? bus : other).kv.put(BUCKET, key, `${salt}`)))),
      )
      expect(new Set(outcomes)).toEqual(new Set(['ok']))
      expect(await Promise.all(many.map(text))).not.toContain(null)
    }
  })
})

describe('SQL', () => {
  test('K2 kv_cas with an expectation that is no revision loses, and null means absent', async () => {
    const key = freshKey()
    const cas = async (expected: number | null) => {
      const { rows } = await observer.query(`select ${schema}.kv_cas($1, $2, 'x', $3) as revision`, [BUCKET, key, expected])
      return (rows[0] as { revision: string | null }).revision
    }
    expect(await cas(0)).toBeNull()
    expect(await cas(-1)).toBeNull()
    const revision = await cas(null)
    expect(revision).not.toBeNull()
    expect(await cas(null)).toBeNull()
    expect(Number(await cas(Number(revision)))).toBeGreaterThan(Number(revision))
  })
})

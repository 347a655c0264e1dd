/** Keys and watches, the races written out as the steps of sessions. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type KvChange, PostgresBus } from '../../src/index.ts'
import { Bell } from '../../src/runtime/bell.ts'
import { systemClock } from '../../src/runtime/clock.ts'
import { ChangeWatch } from '../../src/runtime/watch.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { outcome } from './support/outcome.ts'
import { rival } from './support/rival.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
const BUCKET = 'races'

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

async function nextChange(watch: AsyncIterable<KvChange>, withinMs = 10_000): Promise<KvChange> {
  const tooLate = Promise.withResolvers<never>()
  const timer = setTimeout(() => tooLate.reject(new Error(`no change came within ${withinMs} ms`)), withinMs)
  try {
    const result = await Promise.race([watch[Symbol.asyncIterator]().next(), tooLate.promise])
    if (result.done) throw new Error('the watch ended')
    return result.value
  } finally {
    clearTimeout(timer)
  }
}

const revisionOf = (change: KvChange) => (change.operation === 'put' ? change.entry.revision : change.revision)
const keyOf = (change: KvChange) => (change.operation === 'put' ? change.entry.key : change.key)

/**
 * The backend of the bus that waits for a lock, however long that takes. A batch that meets a locked key waits for an instant only
 * and is then given up, and what it has drawn and looked at with it: to have seen that one wait shows nothing.
 */
async function blockedBackend(): Promise<number> {
  return eventually(
    async () => {
      const { rows } = await observer.query(
        `select pid from pg_stat_activity
         where wait_event_type = 'Lock' and query like '%' || $1 || '%' and query not like '%kv_write_soon%' and pid <> pg_backend_pid()`,
        [schema],
      )
      return (rows[0] as { pid: number } | undefined)?.pid ?? 0
    },
    { everyMs: 5, what: 'a statement that waits for a lock' },
  )
}

async function untilAbsent(key: string): Promise<void> {
  await eventually(async () => (await other.kv.get(BUCKET, key)) === null, { everyMs: 5, what: 'the end of the entry' })
}

describe('compare and set', () => {
  test('K2 of fifty with the same expectation, in two buses, one wins; twenty rounds end at twenty', async () => {
    const key = freshKey()
    let revision: number | null = null
    for (let round = 1; round <= 20; round++) {
      const expected: number | null = revision
      const results: PromiseSettledResult<number>[] = await Promise.allSettled(
        Array.from({ length: 50 }, (_, n) => (n % 2 ? bus : other).kv.cas(BUCKET, key, `${round}`, expected)),
      )
      const won = results.filter((result) => result.status === 'fulfilled')
      expect(won).toHaveLength(1)
      for (const result of results) if (result.status === 'rejected') expect(result.reason.code).toBe('cas_conflict')
      revision = won[0]!.value
    }
    const entry = await bus.kv.get(BUCKET, key)
    expect([new TextDecoder().decode(entry!.value), entry!.revision]).toEqual(['20', revision])
  })

  test('K2 the winner of a race for an absent key rolls back: one of the others wins', async () => {
    const key = freshKey()
    await using winner = await rival(connectionString)
    await winner.query('begin')
    expect(await bus.kv.cas(BUCKET, key, 'winner', null, { tx: winner })).toBeGreaterThan(0)
    const losers = Array.from({ length: 5 }, (_, n) => outcome(other.kv.cas(BUCKET, key, `${n}`, null)))
    await blockedBackend()
    await winner.query('rollback')
    expect((await Promise.all(losers)).sort()).toEqual(['cas_conflict', 'cas_conflict', 'cas_conflict', 'cas_conflict', 'ok'])
  })

  test('K1 K2 an expectation from before a deletion never fits again', async () => {
    const key = freshKey()
    const before = await bus.kv.put(BUCKET, key, 'a')
    await other.kv.delete(BUCKET, key)
    expect(await outcome(bus.kv.cas(BUCKET, key, 'b', before))).toBe('cas_conflict')
    const after = await other.kv.cas(BUCKET, key, 'c', null)
    expect(after).toBeGreaterThan(before)
    expect(await outcome(bus.kv.cas(BUCKET, key, 'd', before))).toBe('cas_conflict')
    await expect(bus.kv.cas(BUCKET, key, 'd', before)).rejects.toMatchObject({ expected: before, actual: after })
  })

  test('K2 an entry that runs out while the cas waits for its row is absent to it: others have seen that it was gone', async () => {
    const key = freshKey()
    await using holder = await rival(connectionString)
    const revision = await bus.kv.put(BUCKET, key, 'a', { ttlMs: 1_000 })
    await holder.query('begin')
    await holder.query(`select from ${schema}.kv_entries where bucket = $1 and key = $2 for update`, [BUCKET, key])
    const cas = outcome(bus.kv.cas(BUCKET, key, 'b', revision))
    await blockedBackend()
    await untilAbsent(key)
    await holder.query('commit')
    expect(await cas).toBe('cas_conflict')
    expect(await other.kv.get(BUCKET, key)).toBeNull()
  })

  test('K3 so it is to a conditional delete', async () => {
    const key = freshKey()
    await using holder = await rival(connectionString)
    const revision = await bus.kv.put(BUCKET, key, 'a', { ttlMs: 400 })
    await holder.query('begin')
    await holder.query(`select from ${schema}.kv_entries where bucket = $1 and key = $2 for update`, [BUCKET, key])
    const deletion = outcome(bus.kv.delete(BUCKET, key, { expected: revision }))
    await blockedBackend()
    await untilAbsent(key)
    await holder.query('commit')
    expect(await deletion).toBe('cas_conflict')
  })

  test('K2 a cas for an absent key that waited for a row that ran out meanwhile wins', async () => {
    const key = freshKey()
    await using holder = await rival(connectionString)
    const revision = await bus.kv.put(BUCKET, key, 'a', { ttlMs: 400 })
    await holder.query('begin')
    await holder.query(`select from ${schema}.kv_entries where bucket = $1 and key = $2 for update`, [BUCKET, key])
    const cas = bus.kv.cas(BUCKET, key, 'b', null)
    await blockedBackend()
    await untilAbsent(key)
    await holder.query('commit')
    expect(await cas).toBeGreaterThan(revision)
  })
})

describe('what lost', () => {
  test.each(['cas', 'delete'] as const)('K2 K3 a %s that is lost in a transaction leaves the key to others', async (way) => {
    const key = freshKey()
    const old = await bus.kv.put(BUCKET, key, 'a')
    await bus.kv.put(BUCKET, key, 'b')
    await using caller = await rival(connectionString)
    await caller.query('begin')
    const lost =
      way === 'cas' ? bus.kv.cas(BUCKET, key, 'c', old, { tx: caller }) : bus.kv.delete(BUCKET, key, { expected: old, tx: caller })
    expect(await outcome(lost)).toBe('cas_conflict')
    await using writer = await rival(connectionString)
    await writer.query(`begin; set local lock_timeout = '2s'`)
    expect(await outcome(other.kv.put(BUCKET, key, 'd', { tx: writer }))).toBe('ok')
    await writer.query('commit')
    await caller.query('commit')
  })

  test('K2 one that is lost at once does not wait for whoever has the row', async () => {
    const key = freshKey()
    const old = await bus.kv.put(BUCKET, key, 'a')
    await bus.kv.put(BUCKET, key, 'b')
    await using holder = await rival(connectionString)
    await holder.query('begin')
    await bus.kv.put(BUCKET, key, 'c', { tx: holder })
    await using writer = await rival(connectionString)
    await writer.query(`begin; set local lock_timeout = '2s'`)
    expect(await outcome(other.kv.cas(BUCKET, key, 'd', old, { tx: writer }))).toBe('cas_conflict')
    await writer.query('commit')
    await holder.query('commit')
  })
})

describe('revisions', () => {
  test('K1 K6 put, delete, cas and rolled back writes of four sessions at once: every watch sees them grow and ends with what is there', async () => {
    const key = freshKey()
    await using watch = await other.kv.watch(BUCKET, key)
    const writers = Array.from({ length: 4 }, async (_, writer) => {
      await using caller = await rival(connectionString)
      for (let n = 0; n < 50; n++) {
        switch ((n + writer) % 4) {
          case 0:
            await bus.kv.put(BUCKET, key, `${writer}-${n}`)
            break
          case 1:
            await other.kv.delete(BUCKET, key)
            break
          case 2:
            await outcome(bus.kv.cas(BUCKET, key, `${writer}-${n}`, null))
            break
          default:
            await caller.query('begin')
            await bus.kv.put(BUCKET, key, `${writer}-${n}`, { tx: caller })
            await caller.query(n % 3 ? 'commit' : 'rollback')
        }
      }
    })
    await Promise.all(writers)
    const last = await bus.kv.put(BUCKET, key, 'last')
    const seen: number[] = []
    while (seen.at(-1) !== last) seen.push(revisionOf(await nextChange(watch)))
    expect(seen).toEqual([...new Set(seen)].sort((a, b) => a - b))
    const { rows } = await observer.query(`select revision from ${schema}.kv_changes where bucket = $1 and key = $2 order by revision`, [
      BUCKET,
      key,
    ])
    expect(seen).toEqual((rows as { revision: string }[]).map(({ revision }) => Number(revision)))
  })

  test('K1 a put that waited behind a lock, while another was under way, is later than it', async () => {
    const key = freshKey()
    await bus.kv.put(BUCKET, key, 'first')
    await using first = await rival(connectionString)
    await first.query('begin')
    await first.query(`select from ${schema}.kv_entries where bucket = $1 and key = $2 for update`, [BUCKET, key])
    const waiting = other.kv.put(BUCKET, key, 'waiting')
    await blockedBackend()
    const within = await bus.kv.put(BUCKET, key, 'within', { tx: first })
    await first.query('commit')
    expect(await waiting).toBeGreaterThan(within)
  })

  test('K1 a put that waited behind a deletion is later than it: a deleted key leaves its place', async () => {
    const key = freshKey()
    await bus.kv.put(BUCKET, key, 'first')
    await using first = await rival(connectionString)
    await first.query('begin')
    await first.query(`select from ${schema}.kv_entries where bucket = $1 and key = $2 for update`, [BUCKET, key])
    // It has drawn a revision for the case that the key is absent.
    const waiting = other.kv.put(BUCKET, key, 'waiting')
    await blockedBackend()
    await bus.kv.delete(BUCKET, key, { tx: first })
    const { rows } = await first.query(`select max(revision) as deleted from ${schema}.kv_changes where bucket = $1 and key = $2`, [
      BUCKET,
      key,
    ])
    await first.query('commit')
    expect(await waiting).toBeGreaterThan(Number((rows[0] as { deleted: string }).deleted))
  })
})

describe('watches', () => {
  test('K6 a transaction that began before the watch and commits after it is a change, and no entry is seen twice', async () => {
    const [early, late] = [freshKey(), freshKey()]
    const bucket = 'straggler'
    await bus.kv.put(bucket, early, 'e')
    await using straggler = await rival(connectionString)
    await straggler.query('begin')
    const revision = await bus.kv.put(bucket, late, 'l', { tx: straggler })
    // Later ids end before it: the snapshot of the watch has it in its middle.
    await other.kv.put(bucket, early, 'f')
    await using watch = await other.kv.watch(bucket)
    expect(keyOf(await nextChange(watch))).toBe(early)
    await straggler.query('commit')
    const change = await nextChange(watch)
    expect([keyOf(change), revisionOf(change)]).toEqual([late, revision])
    const last = await bus.kv.put(bucket, early, 'last')
    expect(revisionOf(await nextChange(watch))).toBe(last)
  })

  test('K6 what is written between the snapshot of a watch and its entries is seen once', async () => {
    const bucket = 'between'
    await bus.kv.put(bucket, 'before', '1')
    await using writer = await rival(connectionString)
    await writer.query('begin')
    await writer.query(`lock table ${schema}.kv_entries in access exclusive mode`)
    const watching = other.kv.watch(bucket)
    await blockedBackend()
    await writer.query(`select ${schema}.kv_put($1, 'between', '2')`, [bucket])
    await writer.query('commit')
    await using watch = await watching
    await bus.kv.put(bucket, 'after', '3')
    const seen: string[] = []
    while (seen.at(-1) !== 'after') seen.push(keyOf(await nextChange(watch)))
    expect(seen).toEqual(['before', 'between', 'after'])
  })

  test('K6 the connections of a watch are terminated again and again while others write: it sees every change, once', async () => {
    const bucket = 'cut'
    await using watching = await PostgresBus.connect({
      connectionString: withName('cut watch'),
      schema,
      maintenance: false,
      pollIntervalMs: 100,
    })
    const watch = await watching.kv.watch(bucket)
    const written: number[] = []
    for (let n = 0; n < 60; n++) {
      written.push(await bus.kv.put(bucket, `k${n % 7}`, `${n}`))
      if (n % 6 === 0) await observer.query(`select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'cut watch'`)
    }
    const seen: number[] = []
    while (seen.length < written.length) seen.push(revisionOf(await nextChange(watch)))
    expect(seen).toEqual(written)
  })

  test('K6 a bucket that never rests does not end its watch: what counts as cut off is a watch that cannot read', async () => {
    let now = 0
    let revision = 0
    const clock = { ...systemClock, now: () => now }
    const READS = 30
    const watch = new ChangeWatch({
      clock,
      ear: new Bell(clock).listen({ kind: 'bucket', name: 'busy' }),
      source: {
        // A minute between two reads, each of which brings something.
        read: async () => {
          now += 60_000
          revision++
          return revision > READS ? [] : [{ operation: 'delete', key: 'k', revision }]
        },
      },
      pollIntervalMs: 1_000,
      keptMs: 9 * 60_000,
      signal: undefined,
      isClosed: () => false,
      onClose: () => {},
    })
    const seen: number[] = []
    while (seen.length < READS) seen.push(revisionOf(await nextChange(watch)))
    await watch.close()
    expect(seen).toEqual(Array.from({ length: READS }, (_, n) => n + 1))
  })
})

function withName(name: string): string {
  const url = new URL(connectionString)
  url.searchParams.set('application_name', name)
  return url.href
}

describe('a server that crashes', () => {
  let server: EmbeddedPostgres

  beforeAll(async () => {
    // What ends without a synchronous commit then stays in memory, as it does for up to 600 ms anyway.
    server = await startEmbeddedPostgres({ settings: { wal_writer_delay: '10s', autovacuum: 'off' } })
  })

  afterAll(() => server.stop('immediate'))

  test('K6 transaction ids that the crash gives out again are not taken for seen by an open watch', async () => {
    await using watching = await PostgresBus.connect({
      connectionString: server.connectionString,
      maintenance: false,
      pollIntervalMs: 30,
    })
    await watching.kv.put(BUCKET, 'k', 'before')
    await using watch = await watching.kv.watch(BUCKET)
    expect(revisionOf(await nextChange(watch))).toBeGreaterThan(0)
    {
      await using caller = await session(server.connectionString)
      // Ids that are used up and nowhere on disk.
      for (let n = 0; n < 50; n++) await caller.query('begin; select pg_current_xact_id(); rollback')
      const { rows } = await caller.query('select clock_timestamp()::text as at')
      const { at } = rows[0] as { at: string }
      // Three looks later their end has gone into the position of the watch.
      for (let looks = 0, last = at; looks < 3; looks++) {
        last = await eventually(
          async () => {
            const { rows: found } = await caller.query(
              `select max(query_start)::text as at from pg_stat_activity
               where query like '%kv_changes_between%' and pid <> pg_backend_pid() having max(query_start) > $1::timestamptz`,
              [last],
            )
            return (found[0] as { at: string } | undefined)?.at ?? ''
          },
          { everyMs: 5, what: 'a look of the watch' },
        )
      }
    }
    await server.kill()
    await server.restart()
    const written: number[] = []
    await using caller = await session(server.connectionString)
    for (let n = 0; n < 5; n++) {
      const { rows } = await caller.query(`select klieo.kv_put($1, 'k', 'after') as revision`, [BUCKET])
      written.push(Number((rows[0] as { revision: string }).revision))
    }
    const seen: number[] = []
    while (seen.length < written.length) seen.push(revisionOf(await nextChange(watch, 8_000)))
    expect(seen).toEqual(written)
  })
})

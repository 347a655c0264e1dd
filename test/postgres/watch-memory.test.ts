/** The memory of watches: pages end where their bytes do, and what nobody reads is bounded. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type KvChange, PostgresBus } from '../../src/index.ts'
import { WATCH_CHANGES, WATCH_ENTRIES } from '../../src/postgres/kv.sql.ts'
import { inSchema } from '../../src/postgres/schema-name.ts'
import { Bell } from '../../src/runtime/bell.ts'
import { systemClock } from '../../src/runtime/clock.ts'
import { ChangeWatch } from '../../src/runtime/watch.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import type { Session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { rival } from './support/rival.ts'

const connectionString = databaseUrl()
const schema = freshSchema()
let observer: Session
let bus: PostgresBus

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
  observer = await rival(connectionString)
})
afterAll(async () => {
  await bus?.close()
  await observer?.[Symbol.asyncDispose]()
})

describe('a watch of large values', () => {
  const VALUE = 400_000
  const put = (from: number, to: number) =>
    Promise.all(Array.from({ length: to - from }, (_, n) => bus.kv.put('large', `key-${from + n}`, new Uint8Array(VALUE).fill(1))))

  test('K6 a page of entries or changes ends where its bytes do, and says that there is more', async () => {
    const { rows: before } = await observer.query('select pg_current_snapshot()::text as snapshot')
    await put(0, 20)
    const { rows: after } = await observer.query('select pg_current_snapshot()::text as snapshot')
    const [lo, hi] = [before[0].snapshot, after[0].snapshot]
    const entries = await observer.query(inSchema(WATCH_ENTRIES, schema), ['large', null, '', 1_000, hi, 1_000_000])
    expect([entries.rows.length, Number(entries.rows[0].found)]).toEqual([3, 20])
    const changes = await observer.query(inSchema(WATCH_CHANGES, schema), ['large', null, lo, hi, 0, 1_000, 1_000_000])
    expect([changes.rows.length, Number(changes.rows[0].found)]).toEqual([3, 20])
    const one = await observer.query(inSchema(WATCH_ENTRIES, schema), ['large', null, '', 1_000, hi, 1])
    expect(one.rows.length).toBe(1)
  })

  test('K6 it yields every entry and every change, over many such pages', async () => {
    await using watch = await bus.kv.watch('large')
    await put(10, 40)
    const seen: string[] = []
    for await (const change of watch) {
      if (change.operation === 'put') seen.push(change.entry.key)
      if (seen.length === 50) break
    }
    expect(new Set(seen.slice(0, 20))).toEqual(new Set(Array.from({ length: 20 }, (_, n) => `key-${n}`)))
    expect(new Set(seen.slice(20))).toEqual(new Set(Array.from({ length: 30 }, (_, n) => `key-${10 + n}`)))
  })
})

describe('a watch that nobody reads', () => {
  const MIB = 2 ** 20

  function watchOf(bytes: number) {
    const state = { now: 0, reads: 0 }
    const clock = { ...systemClock, now: () => state.now }
    const ear = new Bell(clock).listen({ kind: 'bucket', name: 'b' })
    const change = (revision: number): KvChange => ({
      operation: 'put',
      entry: { key: 'k', value: new Uint8Array(bytes), revision, updatedAt: new Date(0) },
    })
    const watch = new ChangeWatch({
      clock,
      ear,
      source: {
        read: async () => {
          state.reads++
          return [change(state.reads)]
        },
        // As in a window that is larger than what was read of it.
        readUpTo: () => 0,
      },
      pollIntervalMs: 1_000,
      keptMs: 9 * 60_000,
      signal: undefined,
      isClosed: () => false,
      onClose: () => {},
    })
    return { watch, state, ear, changes: watch[Symbol.asyncIterator]() }
  }

  test('K6 it reads ahead by so many bytes, and goes on when some are taken', async () => {
    const { watch, state, changes } = watchOf(MIB)
    await eventually(() => state.reads === 8)
    await changes.next()
    await eventually(() => state.reads === 9)
    for (let n = 2; n <= 20; n++) expect((await changes.next()).value).toMatchObject({ entry: { revision: n } })
    await eventually(() => state.reads === 28)
    await watch.close()
  })

  test('K6 changes that would be pruned are read, too, but not without end: then it fails rather than skip any', async () => {
    const { state, ear, changes } = watchOf(MIB)
    await eventually(() => state.reads === 8)
    state.now = 5 * 60_000
    ear.ring()
    await eventually(() => state.reads === 64)
    state.now = 9 * 60_000 + 1
    ear.ring()
    for (let n = 1; n <= 64; n++) expect((await changes.next()).value).toMatchObject({ entry: { revision: n } })
    await expect(changes.next()).rejects.toMatchObject({ code: 'connection', retryable: true })
    expect(state.reads).toBe(64)
  })
})

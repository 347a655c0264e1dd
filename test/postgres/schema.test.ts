import { readFile } from 'node:fs/promises'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { dumpSchema, SCHEMA_FILE } from '../../scripts/dump-schema.ts'
import { BusError, PostgresBus } from '../../src/index.ts'
import { startChild } from '../support/child.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'

const schema = freshSchema()
let client: Session

beforeAll(async () => {
  client = await session(databaseUrl())
  await PostgresBus.migrate({ connectionString: databaseUrl(), schema })
})

afterAll(async () => {
  await client[Symbol.asyncDispose]()
})

async function rejection(promise: Promise<unknown>): Promise<BusError> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  )
  expect(error).toBeInstanceOf(BusError)
  return error as BusError
}

/** Eight processes that start on two cores. */
const PATIENCE_MS = 60_000

describe('the schema', () => {
  test('sql/schema.sql is what the migrations make: run `node scripts/dump-schema.ts` after a change', async () => {
    // Server versions print a view's columns with or without its alias.
    const plain = (text: string) => text.replaceAll(/\b[a-z]\.(?=[a-z_])/g, '')
    expect(plain(await dumpSchema(client, schema))).toBe(plain(await readFile(SCHEMA_FILE, 'utf8')))
  })

  test('every table, view, column and function carries a comment', async () => {
    const { rows } = await client.query<{ what: string }>(
      `select format('%I', c.relname) as what
       from pg_class c
       where c.relnamespace = $1::regnamespace and c.relkind in ('r', 'v') and obj_description(c.oid, 'pg_class') is null
       union all
       select format('%I.%I', c.relname, a.attname)
       from pg_class c
       join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
       where c.relnamespace = $1::regnamespace and c.relkind in ('r', 'v') and col_description(c.oid, a.attnum) is null
       union all
       select format('%I()', p.proname)
       from pg_proc p
       where p.pronamespace = $1::regnamespace and obj_description(p.oid, 'pg_proc') is null`,
      [schema],
    )
    expect(rows.map(({ what }) => what)).toEqual([])
  })

  test('eight processes that start at once, again and again, make one schema and all succeed', async () => {
    for (let round = 0; round < 3; round++) {
      const name = freshSchema()
      const children = Array.from({ length: 8 }, () =>
        startChild(new URL('support/migrate-child.ts', import.meta.url), { args: [databaseUrl(), name] }),
      )
      try {
        await Promise.all(children.map((child) => child.next((line) => line.ready === true, PATIENCE_MS)))
        for (const child of children) child.send('go')
        const answers = await Promise.all(
          children.map((child) => child.next(({ seq, error }) => seq !== undefined || error !== undefined, PATIENCE_MS)),
        )
        expect(answers.map(({ error }) => error)).toEqual(Array(8).fill(undefined))
        expect(new Set(answers.map(({ seq }) => seq)).size).toBe(8)
        const { rows } = await client.query(`select name from ${name}.migrations`)
        expect(rows.length).toBeGreaterThanOrEqual(3)
      } finally {
        await Promise.all(children.map((child) => child.kill()))
      }
    }
  }, 200_000)

  test('a migration goes on while other schemas of the database come and go', async () => {
    await using other = await session(databaseUrl())
    let over = false
    const comings = (async () => {
      const name = freshSchema()
      while (!over) {
        await other.query(`create schema ${name}; create table ${name}.t (id bigint generated always as identity, s serial)`)
        await other.query(`drop schema ${name} cascade`)
      }
    })()
    try {
      for (let round = 0; round < 5; round++) {
        expect((await PostgresBus.migrate({ connectionString: databaseUrl(), schema: freshSchema() })).length).toBeGreaterThan(0)
      }
    } finally {
      over = true
      await comings
    }
  })

  test('a schema of a newer version that this one cannot work with is refused with schema_outdated, and nothing is changed', async () => {
    const name = freshSchema()
    await PostgresBus.migrate({ connectionString: databaseUrl(), schema: name })
    await client.query(`insert into ${name}.migrations (name, timestamp) values ('9999_breaking', 'later')`)
    await client.query(`update ${name}.meta set value = '9999' where key = 'compatible_with'`)
    for (const migrate of [true, false]) {
      const error = await rejection(PostgresBus.connect({ connectionString: databaseUrl(), schema: name, migrate }))
      expect(error.code).toBe('schema_outdated')
      expect(error.message).toContain('9999_breaking')
    }
  })

  test('a schema of a newer version that says it is compatible is worked with', async () => {
    const name = freshSchema()
    await PostgresBus.migrate({ connectionString: databaseUrl(), schema: name })
    await client.query(`insert into ${name}.migrations (name, timestamp) values ('9999_harmless', 'later')`)
    await using bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema: name })
    expect((await bus.pubsub.publish('a', 'b')).seq).toBe(1)
  })

  test('without migrate a missing schema is schema_outdated, and says what to run', async () => {
    const error = await rejection(PostgresBus.connect({ connectionString: databaseUrl(), schema: freshSchema(), migrate: false }))
    expect(error.code).toBe('schema_outdated')
    expect(error.message).toContain('klieo-bus migrate')
  })

  test('a role without rights gets permission_denied', async () => {
    const role = freshSchema()
    await client.query(`create role ${role} login password 'secret'`)
    try {
      const url = new URL(databaseUrl())
      url.username = role
      url.password = 'secret'
      const error = await rejection(PostgresBus.connect({ connectionString: url.href, schema }))
      expect(error.code).toBe('permission_denied')
      expect(error.message).not.toContain('secret')
    } finally {
      await client.query(`drop role ${role}`)
    }
  })

  test('two buses in two schemas of a database do not see one another', async () => {
    const [left, right] = [freshSchema(), `${freshSchema()}-Q`]
    await using one = await PostgresBus.connect({ connectionString: databaseUrl(), schema: left })
    await using two = await PostgresBus.connect({ connectionString: databaseUrl(), schema: right })
    try {
      await one.kv.put('b', 'k', 'left')
      expect(await two.kv.get('b', 'k')).toBeNull()
      expect((await two.kv.cas('b', 'k', 'right', null)) > 0).toBe(true)
      await one.jobs.enqueue('q', { payload: 'left' })
      expect(await two.jobs.claim('q', 'w', 1_000)).toBeNull()
    } finally {
      await two.close()
      await client.query(`set client_min_messages = warning; drop schema "${right}" cascade`)
    }
  })

  test('the name of a schema is checked, and never becomes a statement', async () => {
    for (const name of ['', 'a b', 'a"b', "a'b", 'a;drop table x', 'pg_x', 'ü', 'x'.repeat(64), 7 as unknown as string]) {
      const error = await rejection(PostgresBus.connect({ connectionString: databaseUrl(), schema: name }))
      expect(error.code).toBe('invalid_argument')
      expect(error.message).toContain('schema')
    }
  })
})

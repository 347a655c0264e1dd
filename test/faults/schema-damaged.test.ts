/**
 * Schemas that are not as the migrations made them, and roles without the rights: told at connect or at the call, with a code and what
 * to do, and never as something unexpected.
 */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { isBusError } from '../../src/core/index.ts'
import { BusError, PostgresBus } from '../../src/index.ts'
import { migrationNames } from '../../src/postgres/migrations.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { migratePartly } from './support/network/releases.ts'

const connectionString = databaseUrl()
const LONG_MS = 60_000

let owner: Session

beforeAll(async () => {
  owner = await session(connectionString)
  await owner.query('set client_min_messages = warning')
})

afterAll(() => owner[Symbol.asyncDispose]())

async function failureOf(call: Promise<unknown>): Promise<BusError> {
  const failure = await call.then(
    () => undefined,
    (error: unknown) => error,
  )
  expect(failure).toBeInstanceOf(BusError)
  return failure as BusError
}

const connect = (schema: string, more: { migrate?: boolean; connectionString?: string } = {}) =>
  PostgresBus.connect({ connectionString, schema, maintenance: false, ...more })
const connectFails = (schema: string, more?: { migrate?: boolean; connectionString?: string }) =>
  failureOf(
    connect(schema, more).then(async (bus) => {
      await bus.close()
    }),
  )

/** Every way into the schema. */
const CALLS: Readonly<Record<string, (bus: PostgresBus) => Promise<unknown>>> = {
  publish: (bus) => bus.pubsub.publish('a', 'x'),
  publishWithId: (bus) => bus.pubsub.publish('a', 'x', { msgId: crypto.randomUUID() }),
  subscribe: (bus) => bus.pubsub.subscribe('a', `d-${crypto.randomUUID()}`),
  fetch: async (bus) => {
    const stream = await bus.pubsub.subscribe('a', 'there')
    return stream[Symbol.asyncIterator]().next()
  },
  enqueue: (bus) => bus.jobs.enqueue('q', { payload: 'x' }),
  enqueueWithKey: (bus) => bus.jobs.enqueue('q', { payload: 'x', dedupKey: crypto.randomUUID() }),
  claim: (bus) => bus.jobs.claim('q', 'w', LONG_MS),
  work: async (bus) => {
    await bus.jobs.enqueueMany('work', [{ payload: 'x' }])
    const job = await bus.jobs.claim('work', 'w', LONG_MS)
    await job?.heartbeat()
    await job?.ack()
  },
  handle: async (bus) => {
    await bus.pubsub.publishMany([{ subject: 'handle', payload: 'x' }])
    await using stream = await bus.pubsub.subscribe('handle', 'handle', { start: 'new' })
    await bus.pubsub.publish('handle', 'x')
    const { value } = await stream[Symbol.asyncIterator]().next()
    await value?.ack()
  },
  put: (bus) => bus.kv.put('b', 'k', 'v'),
  cas: (bus) => bus.kv.cas('b', crypto.randomUUID(), 'v', null),
  get: (bus) => bus.kv.get('b', 'k'),
  delete: (bus) => bus.kv.delete('b', 'k'),
  watch: (bus) => bus.kv.watch('b'),
  keys: (bus) => bus.kv.keys('b')[Symbol.asyncIterator]().next(),
  lease: async (bus) => {
    const lease = await bus.kv.lease('b', crypto.randomUUID(), LONG_MS)
    await lease.heartbeat()
    await lease.release()
  },
  request: async (bus) => {
    // Nobody answers requests here, and that is an answer.
    await bus.requestReply.request('a', 'x', { timeoutMs: 2_000 }).catch((error: unknown) => {
      if (!isBusError(error, 'not_found')) throw error
    })
  },
}

/** Those of an operator, for which a worker has no rights. */
const OPERATORS_CALLS: typeof CALLS = {
  look: async (bus) => {
    await bus.admin.queues()
    await bus.admin.durables()
    await bus.admin.jobs()[Symbol.asyncIterator]().next()
  },
  pause: async (bus) => {
    await bus.admin.pauseQueue('paused')
    await bus.admin.resumeQueue('paused')
  },
  purge: (bus) => bus.admin.purgeMessages('nothing.here'),
}

/** A bus on a schema of its own that has what the calls need. */
async function prepared(): Promise<{ bus: PostgresBus; schema: string }> {
  const schema = freshSchema()
  const bus = await connect(schema)
  await (await bus.pubsub.subscribe('a', 'there')).close()
  await bus.pubsub.publish('a', 'x')
  await bus.jobs.enqueue('q', { payload: 'x' })
  return { bus, schema }
}

describe('at connect', () => {
  test('a schema of an older release, without migrate: schema_outdated, which names what is missing and what to run; with it, it is made whole', async () => {
    const schema = freshSchema()
    const names = migrationNames()
    await migratePartly(connectionString, schema, 3)
    const failure = await connectFails(schema, { migrate: false })
    expect(failure).toMatchObject({ code: 'schema_outdated', retryable: false })
    for (const name of names.slice(3)) expect(failure.message).toContain(name)
    expect(failure.message).toContain('klieo-bus migrate')
    expect(await PostgresBus.migrate({ connectionString, schema, check: true })).toEqual(names.slice(3))
    await using bus = await connect(schema)
    expect((await bus.pubsub.publish('a', 'x')).seq).toBe(1)
  })

  test('a schema that holds somebody else’s tables of the same names: schema_outdated, which says so, and they are left as they were', async () => {
    const schema = freshSchema()
    await owner.query(`create schema ${schema}; create table ${schema}.jobs (mine text); insert into ${schema}.jobs values ('precious')`)
    const failure = await connectFails(schema)
    expect(failure.code).toBe('schema_outdated')
    expect(failure.message).toMatch(/use another schema/)
    const { rows } = await owner.query(`select * from ${schema}.jobs`)
    expect(rows).toEqual([{ mine: 'precious' }])
    const { rowCount } = await owner.query(`select from pg_tables where schemaname = $1 and tablename = 'messages'`, [schema])
    expect(rowCount).toBe(0)
  })

  test('a schema whose list of migrations was lost: schema_outdated, and nothing is made twice', async () => {
    const { bus, schema } = await prepared()
    await bus.close()
    await owner.query(`drop table ${schema}.migrations`)
    const failure = await connectFails(schema)
    expect(failure.code).toBe('schema_outdated')
    expect(failure.message).toMatch(/restore/)
    expect((await connectFails(schema, { migrate: false })).code).toBe('schema_outdated')
  })

  test.for(['function %s.restored()', 'table %s.messages cascade', 'table %s.kv_changes cascade', 'table %s.consumer_offsets cascade'])(
    'a schema that lacks %s: schema_outdated',
    async (what) => {
      const { bus, schema } = await prepared()
      await bus.close()
      await owner.query(`drop ${what.replace('%s', schema)}`)
      const failure = await connectFails(schema)
      expect(failure.code).toBe('schema_outdated')
      expect(failure.message).toMatch(/migrate|restore/)
    },
  )
})

describe('at the call', () => {
  const damages: Readonly<Record<string, (schema: string) => string>> = {
    'the whole schema is dropped': (schema) => `drop schema ${schema} cascade`,
    'every table is dropped': (schema) =>
      `do $$ declare t text; begin for t in select tablename from pg_tables where schemaname = '${schema}' loop execute format('drop table ${schema}.%I cascade', t); end loop; end $$`,
    'every function is dropped': (schema) =>
      `do $$ declare f regprocedure; begin for f in select oid::regprocedure from pg_proc where pronamespace = '${schema}'::regnamespace loop execute format('drop function %s cascade', f); end loop; end $$`,
    'columns are missing': (schema) =>
      ['messages.subject', 'consumer_offsets.lo', 'jobs.priority', 'kv_entries.revision', 'kv_leases.fence', 'responders.pattern']
        .map((column) => `alter table ${schema}.${column.split('.')[0]} drop column ${column.split('.')[1]} cascade`)
        .join(';'),
    'columns have other types': (schema) =>
      `alter table ${schema}.messages alter column payload type text using null, alter payload drop not null;
       alter table ${schema}.kv_entries drop constraint kv_entries_dedup_value;
       alter table ${schema}.kv_entries alter column value type text using null`,
    'primary keys are missing': (schema) =>
      ['kv_entries', 'message_ids', 'kv_leases'].map((table) => `alter table ${schema}.${table} drop constraint ${table}_pkey`).join(';'),
  }

  for (const [what, damage] of Object.entries(damages)) {
    test(`${what} under a connected bus: each call goes through or is schema_outdated and says what to do`, async () => {
      const { bus, schema } = await prepared()
      try {
        if (what === 'columns have other types')
          await owner.query(`drop view ${schema}.message_details, ${schema}.job_details, ${schema}.bucket_stats`)
        await owner.query(damage(schema))
        const codes: Record<string, string> = {}
        for (const [name, call] of Object.entries({ ...CALLS, ...OPERATORS_CALLS })) {
          await call(bus).then(
            () => {
              codes[name] = 'ok'
            },
            (error: unknown) => {
              codes[name] = error instanceof BusError ? error.code : String(error)
              expect.soft((error as Error).message, name).toMatch(/migrate|restore/)
            },
          )
        }
        for (const [name, code] of Object.entries(codes)) expect.soft(['ok', 'schema_outdated'], `${name}: ${code}`).toContain(code)
        expect(Object.values(codes)).toContain('schema_outdated')
      } finally {
        await bus.close()
      }
    })
  }

  test('somebody adds a function of a name of the bus’s that makes its calls ambiguous: schema_outdated, which says to drop it', async () => {
    const { bus, schema } = await prepared()
    await owner.query(
      `create function ${schema}.ack_job(id bigint, token uuid, more text default null) returns boolean language sql as 'select true'`,
    )
    const job = await bus.jobs.claim('q', 'w', LONG_MS)
    const failure = await failureOf(job!.ack())
    expect(failure.code).toBe('schema_outdated')
    expect(failure.message).toContain('drop it')
    await owner.query(`drop function ${schema}.ack_job(bigint, uuid, text)`)
    await job!.ack()
    await bus.close()
  })
})

describe('rights', () => {
  /** @param create what the role may do besides logging in, before the schema is there */
  async function asRole(create: string, body: (role: string, url: string, schema: string) => Promise<void>): Promise<void> {
    const schema = freshSchema()
    const role = `r_${schema}`
    await owner.query(`create role ${role} login password 'p'`)
    if (create !== '') await owner.query(create.replaceAll('%r', role).replaceAll('%s', schema))
    const url = new URL(connectionString)
    url.username = role
    url.password = 'p'
    try {
      await body(role, url.href, schema)
    } finally {
      await owner.query(`drop owned by ${role} cascade; drop role ${role}`)
    }
  }

  /** A worker's bus on a schema of the superuser's. */
  const asWorker = (body: (bus: PostgresBus, role: string, schema: string) => Promise<void>) =>
    asRole('', async (role, url, schema) => {
      await PostgresBus.migrate({ connectionString, schema })
      await owner.query(`select ${schema}.grant_role('worker', $1)`, [role])
      const bus = await connect(schema, { connectionString: url })
      try {
        await (await bus.pubsub.subscribe('a', 'there')).close()
        await body(bus, role, schema)
      } finally {
        await bus.close()
      }
    })

  /** @returns the messages of the calls that are refused, each of them checked */
  async function refusals(bus: PostgresBus, why: string): Promise<string[]> {
    const messages: string[] = []
    for (const [name, call] of Object.entries(CALLS)) {
      // It waits for a message, and here most calls go through.
      if (name === 'fetch') continue
      await call(bus).catch((error: BusError) => {
        messages.push(error.message)
        expect.soft([error.code, error.retryable], `${why}, ${name}: ${error.message}`).toEqual(['permission_denied', false])
      })
    }
    return messages
  }

  test('withdrawn from a worker under a connected bus, the schema’s or those on every function: permission_denied, with the grant that brings each call back', () =>
    asWorker(async (bus, role, schema) => {
      for (const revoke of [
        `revoke usage on schema ${schema} from ${role}`,
        `revoke execute on all functions in schema ${schema} from ${role}`,
        `select ${schema}.revoke_role('${role}')`,
      ]) {
        await owner.query(revoke)
        const messages = await refusals(bus, revoke)
        expect(messages.length, revoke).toBe(Object.keys(CALLS).length - 1)
        for (const message of messages) expect.soft(message).toContain(`select ${schema}.grant_role('`)
        for (const message of new Set(messages)) await owner.query(message.slice(message.indexOf(`select ${schema}.grant_role`)))
        expect(await refusals(bus, `after ${revoke}`)).toEqual([])
      }
    }))

  test('withdrawn on one function after the other: permission_denied where it is needed, with the grant, and the other calls go on', () =>
    asWorker(async (bus, role, schema) => {
      const { rows } = await owner.query<{ name: string; signature: string }>(
        `select proname as name, oid::regprocedure::text as signature from pg_proc
         where pronamespace = $1::regnamespace and has_function_privilege($2, oid, 'execute')`,
        [schema, role],
      )
      const needed: string[] = []
      for (const { name, signature } of rows) {
        await owner.query(`revoke execute on function ${signature} from ${role}`)
        const messages = await refusals(bus, name)
        for (const message of messages) expect.soft(message, name).toContain(`select ${schema}.grant_role('`)
        if (messages.length > 0) needed.push(name)
        await owner.query(`grant execute on function ${signature} to ${role}`)
      }
      expect(needed).toEqual(
        expect.arrayContaining(['ack_deliveries', 'ack_job', 'enqueue_one', 'publish_many', 'take_jobs', 'take_lease']),
      )
      expect(await refusals(bus, 'in the end')).toEqual([])
    }))

  test('of a worker on tables and sequences: it has none and needs none', () =>
    asWorker(async (bus, role, schema) => {
      for (const kind of ['tables', 'sequences']) await owner.query(`revoke all on all ${kind} in schema ${schema} from ${role}, public`)
      expect(await refusals(bus, 'no rights on tables')).toEqual([])
    }))

  test('of the owner on its own tables, sequences and functions: permission_denied, which says that it is the owner who lacks them', () =>
    asRole(`do $$ begin execute format('grant create on database %I to %r', current_database()); end $$`, async (role, url, schema) => {
      const bus = await connect(schema, { connectionString: url })
      try {
        for (const kind of ['tables', 'sequences', 'functions']) {
          await owner.query(`revoke all on all ${kind} in schema ${schema} from ${role}`)
          const messages = await refusals(bus, kind)
          expect(messages.length, kind).toBeGreaterThan(0)
          if (kind !== 'functions') {
            for (const message of messages) expect.soft(message).toContain(`grant all on all ${kind} in schema "${schema}" to <owner>`)
          }
          await owner.query(`grant all on all ${kind} in schema ${schema} to ${role}`)
          expect(await refusals(bus, `${kind} are back`)).toEqual([])
        }
      } finally {
        await bus.close()
      }
    }))

  test('an older schema that belongs to another role: migrating it is permission_denied, and leaves it as it was', async () => {
    const schema = freshSchema()
    await migratePartly(connectionString, schema, 3)
    const role = `r_${schema}`
    await owner.query(
      `create role ${role} login password 'p'; grant usage on schema ${schema} to ${role}; grant all on all tables in schema ${schema} to ${role}`,
    )
    const url = new URL(connectionString)
    url.username = role
    url.password = 'p'
    try {
      const failure = await connectFails(schema, { connectionString: url.href })
      expect(failure.code).toBe('permission_denied')
      expect(failure.message).toContain('migrate as the owner of the schema')
      expect(await PostgresBus.migrate({ connectionString, schema, check: true })).toEqual(migrationNames().slice(3))
    } finally {
      await owner.query(`drop owned by ${role}; drop role ${role}`)
    }
  })
})

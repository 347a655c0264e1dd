/** Passwords and payloads: never in an error, whatever it is asked for, nor in the name of a connection. */

import { inspect } from 'node:util'
import pg from 'pg'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { BusError, PostgresBus, type QueryableTx } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'

const SECRET = 'hunter2-and-more'
const schema = freshSchema()
let owner: Session

beforeAll(async () => {
  owner = await session(databaseUrl())
  await PostgresBus.migrate({ connectionString: databaseUrl(), schema })
})

afterAll(() => owner[Symbol.asyncDispose]())

/** Everything that a logger could make of it, its causes included. */
function told(error: unknown): string {
  const texts: string[] = []
  for (let next: unknown = error, depth = 0; next !== undefined && depth < 10; next = (next as { cause?: unknown }).cause, depth++) {
    texts.push(String(next), inspect(next, { depth: Number.POSITIVE_INFINITY, showHidden: true }), JSON.stringify(next) ?? '')
    if (next instanceof Error) texts.push(next.stack ?? '', JSON.stringify(Object.getOwnPropertyDescriptors(next)))
  }
  return texts.join('\n')
}

async function rejection(promise: Promise<unknown>): Promise<BusError> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  )
  expect(error).toBeInstanceOf(BusError)
  return error as BusError
}

function withPassword(change: (url: URL) => void): string {
  const url = new URL(databaseUrl())
  url.username = 'nobody_of_this_name'
  url.password = SECRET
  change(url)
  return url.href
}

describe('passwords', () => {
  const before = process.env.PGPASSWORD

  afterEach(() => {
    if (before === undefined) delete process.env.PGPASSWORD
    else process.env.PGPASSWORD = before
  })

  const addresses: readonly (readonly [string, string])[] = [
    ['a refused login', withPassword(() => {})],
    ['nobody who listens', withPassword((url) => (url.port = '1'))],
    ['an unknown host', withPassword((url) => (url.hostname = 'no.such.host.invalid'))],
    ['an unknown database', withPassword((url) => (url.pathname = '/no_such_database'))],
    ['TLS that the server has not', withPassword((url) => (url.search = '?sslmode=require'))],
    ['a port that is none', `postgres://u:${SECRET}@127.0.0.1:99999/x`],
    ['an address that is none', `postgres://u:${SECRET}@[::/x`],
    ['another kind of address', `mysql://u:${SECRET}@127.0.0.1/x`],
  ]

  test.each(addresses)('in a connection string are told to nobody: %s', async (_, connectionString) => {
    for (const call of [
      () => PostgresBus.connect({ connectionString, schema }),
      () => PostgresBus.migrate({ connectionString, schema }),
      () =>
        PostgresBus.connect({
          connectionString: databaseUrl(),
          listenConnectionString: connectionString,
          schema: `${schema}_none`,
          migrate: false,
        }),
    ]) {
      expect(told(await rejection(call()))).not.toContain(SECRET)
    }
  })

  test('in a pool and in PGPASSWORD are told to nobody', async () => {
    const { hostname, port } = new URL(databaseUrl())
    for (const config of [
      { host: hostname, port: Number(port), user: 'nobody_of_this_name', password: SECRET },
      { host: hostname, port: 1, user: 'u', password: SECRET },
      { connectionString: `postgres://u:${SECRET}@[::/x` },
      { host: hostname, port: 1, user: 'u', password: () => SECRET },
    ]) {
      const pool = new pg.Pool(config)
      expect(told(await rejection(PostgresBus.connect({ pool, schema })))).not.toContain(SECRET)
      await pool.end()
    }
    process.env.PGPASSWORD = SECRET
    expect(
      told(await rejection(PostgresBus.connect({ connectionString: `postgres://nobody_of_this_name@${hostname}:${port}/x`, schema }))),
    ).not.toContain(SECRET)
  })

  test('are not in the names of connections, nor in the bus itself', async () => {
    const role = `${schema}_secretive`
    await owner.query(`create role ${role} login superuser password '${SECRET}'`)
    const url = new URL(databaseUrl())
    url.username = role
    url.password = SECRET
    const bus = await PostgresBus.connect({ connectionString: url.href, schema })
    try {
      await using _responder = await bus.requestReply.respond('r', () => '')
      const { rows } = await owner.query<{ application_name: string }>('select application_name from pg_stat_activity where usename = $1', [
        role,
      ])
      expect(new Set(rows.map((row) => row.application_name))).toEqual(new Set(['klieo-bus', 'klieo-bus listen', 'klieo-bus presence']))
      expect(inspect(bus, { depth: Number.POSITIVE_INFINITY, showHidden: true })).not.toContain(SECRET)
      expect(JSON.stringify(bus)).not.toContain(SECRET)
    } finally {
      await bus.close()
      await owner.query(`drop role ${role}`)
    }
  })
})

describe('payloads', () => {
  const HEX = Buffer.from(SECRET).toString('hex')

  /** A session whose statements get other parameters than the bus gave them: those that the tables refuse. */
  function spoiling(client: pg.Client, spoil: (values: unknown[]) => unknown[]): QueryableTx {
    return { query: (text, values) => client.query(text, spoil(values)) }
  }

  test('a row that a table refuses is repeated by the server, and by no error of the bus', async () => {
    await using bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema })
    await using client = await session(databaseUrl())
    const direct = await client
      .query(`insert into ${schema}.messages (subject, payload, headers) values ('a', $1, '[]')`, [SECRET])
      .catch((error: unknown) => error)
    expect(told(direct)).toContain(HEX)
    await client.query('begin')
    const tx = spoiling(client, (values) => values.map((value, index) => (index === 4 ? '{"[]"}' : value)))
    const error = await rejection(bus.pubsub.publish('a', SECRET, { tx }))
    await client.query('rollback')
    expect(error.code).toBe('invalid_argument')
    expect((error.cause as { constraint?: string }).constraint).toBe('messages_headers_object')
    expect(told(error)).not.toContain(HEX)
    expect(told(error)).not.toContain(SECRET)
  })

  test('parameters that the server was set to repeat are in no error', async () => {
    await using bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema })
    await using client = await session(databaseUrl())
    await client.query('set log_parameter_max_length_on_error = -1')
    await client.query('begin')
    const tx = spoiling(client, (values) => values.map((value, index) => (index === 4 ? `{"{\\"a\\": \\"${SECRET}\\""}` : value)))
    const error = await rejection(bus.jobs.enqueue('q', { payload: SECRET, headers: { a: 'b' } }, { tx }))
    await client.query('rollback')
    expect(error.code).toBe('invalid_argument')
    expect(told(error)).not.toContain(SECRET)
  })

  test('a payload that is too large is refused by the functions without the row, and by the table when it is inserted directly', async () => {
    const huge = `convert_to(repeat('${SECRET}', 600000), 'UTF8')`
    for (const call of [
      `publish('a', ${huge})`,
      `enqueue('q', ${huge})`,
      `kv_put('b', 'k', ${huge})`,
      `publish_many(array['a'], ${huge}, array[1], array[9600000], null, null)`,
      `enqueue_many(array['q'], ${huge}, array[1], array[9600000], null, null, null, null, null, null)`,
    ]) {
      const error = await owner.query(`select ${schema}.${call}`).catch((reason: unknown) => reason)
      expect((error as { code: string }).code, call).toBe('54000')
      expect((error as { detail?: string }).detail, call).toBeUndefined()
    }
    await expect(
      owner.query(`insert into ${schema}.messages (subject, payload) values ('a', convert_to(repeat('x', 9 * 1024 * 1024), 'UTF8'))`),
    ).rejects.toMatchObject({ code: '23514' })
  }, 90_000)
})

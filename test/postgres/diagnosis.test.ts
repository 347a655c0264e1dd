/** What `PostgresBus.diagnose` finds: each finding in a test that provokes it, and that it is not there before. */

import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type DiagnoseOptions, type Finding, PostgresBus } from '../../src/index.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

/** Few connections and a small notification queue, so that both fill up; autovacuum keeps away from what the tests leave. */
let server: EmbeddedPostgres
let client: Session

beforeAll(async () => {
  server = await startEmbeddedPostgres({
    settings: { max_connections: '20', max_prepared_transactions: '2', max_notify_queue_pages: '64', autovacuum: 'off', fsync: 'on' },
  })
  client = await session(server.connectionString)
})
afterAll(async () => {
  await client[Symbol.asyncDispose]()
  await server.stop('immediate')
})

async function freshBus(): Promise<PostgresBus & { readonly schema: string }> {
  const schema = freshSchema()
  const bus = await PostgresBus.connect({ connectionString: server.connectionString, schema, maintenance: false })
  return Object.assign(bus, { schema })
}

const look = (schema: string, options: DiagnoseOptions = {}) =>
  PostgresBus.diagnose({ connectionString: server.connectionString, schema, ...options })
const of = (findings: readonly Finding[], code: string) => findings.filter((finding) => finding.code === code)
const levels = (findings: readonly Finding[], code: string) => of(findings, code).map(({ level }) => level)

describe('the server', () => {
  test('nothing is wrong: all that was looked at is ok, and nothing is advised', async () => {
    await using bus = await freshBus()
    const findings = await look(bus.schema)
    const wrong = findings.filter(({ level }) => level !== 'ok').map(({ code }) => code)
    // What the settings of this server provoke, which is tested below.
    expect(wrong).toEqual(['autovacuum'])
    const seen = [
      'server',
      'autovacuum',
      'schema',
      'listen',
      'old_snapshot',
      'notify_queue',
      'bloat',
      'role',
      'abandoned_durable',
      'queues',
    ]
    expect(findings.map(({ code }) => code)).toEqual(seen)
    for (const { level, advice } of findings) expect(advice === undefined).toBe(level === 'ok')
  })

  test('a server that cannot be reached is a rejection, not a finding', async () => {
    const gone = PostgresBus.diagnose({ connectionString: 'postgres://127.0.0.1:1/nowhere' })
    await expect(gone).rejects.toMatchObject({ code: 'connection' })
  })

  test('autovacuum that is off, and a server whose fsync is off', async () => {
    await using bus = await freshBus()
    expect(levels(await look(bus.schema), 'autovacuum')).toEqual(['warning'])
    await using fast = await startEmbeddedPostgres({ settings: { fsync: 'off' } })
    const findings = await PostgresBus.diagnose({ connectionString: fast.connectionString })
    expect(levels(findings, 'durability')).toEqual(['warning'])
    expect(levels(await look(bus.schema), 'durability')).toEqual([])
  })

  test('defaults of the role that make each call take a transaction', async () => {
    await using bus = await freshBus()
    const url = new URL(server.connectionString)
    url.searchParams.set('options', '-c default_transaction_isolation=serializable')
    const [finding] = of(await PostgresBus.diagnose({ connectionString: url.href, schema: bus.schema }), 'defaults')
    expect(finding).toMatchObject({ level: 'notice', message: expect.stringContaining('default_transaction_isolation = serializable') })
  })

  test('connections that run out', async () => {
    await using bus = await freshBus()
    const crowd = await Promise.all(Array.from({ length: 12 }, () => session(server.connectionString)))
    const [finding] = of(await look(bus.schema), 'connections')
    for (const one of crowd) await one[Symbol.asyncDispose]()
    expect(finding).toMatchObject({ level: 'warning', message: expect.stringMatching(/^\d+ of 17 connections/) })
  })

  test('connections of other roles, which a role with no rights sees as well', async () => {
    await using bus = await freshBus()
    await client.query(`create role looker login password 'l'`)
    await client.query(`select "${bus.schema}".grant_role('reader', 'looker')`)
    const url = new URL(server.connectionString)
    url.username = 'looker'
    url.password = 'l'
    const connections = async () => of(await PostgresBus.diagnose({ connectionString: url.href, schema: bus.schema }), 'connections')
    expect(await connections()).toEqual([])
    const crowd = await Promise.all(Array.from({ length: 12 }, () => session(server.connectionString)))
    const found = await connections()
    for (const one of crowd) await one[Symbol.asyncDispose]()
    expect(found.map(({ level }) => level)).toEqual(['warning'])
    await client.query(`select "${bus.schema}".revoke_role('looker')`)
    await client.query('drop role looker')
  })

  test('a standby', async () => {
    await using standby = await startEmbeddedPostgres()
    await writeFile(join(standby.dataDir, 'standby.signal'), '')
    await standby.restart()
    const findings = await PostgresBus.diagnose({ connectionString: standby.connectionString })
    expect(of(findings, 'server')).toMatchObject([{ level: 'error', message: expect.stringContaining('standby') }])
    // Of what it holds nothing can be said.
    expect(levels(findings, 'schema')).toEqual([])
  })
})

describe('the schema', () => {
  test('that is missing, lacks a migration, or is newer', async () => {
    expect(of(await look(freshSchema()), 'schema')).toMatchObject([
      { level: 'error', advice: expect.stringContaining('klieo-bus migrate') },
    ])
    await using bus = await freshBus()
    await client.query(`insert into "${bus.schema}".migrations (name, timestamp) values ('9999_later', '')`)
    expect(levels(await look(bus.schema), 'schema')).toEqual(['notice'])
    await client.query(`delete from "${bus.schema}".migrations where name > '0010'`)
    expect(of(await look(bus.schema), 'schema')).toMatchObject([{ level: 'error', message: expect.stringContaining('lacks 0010_') }])
  })

  test('that was restored from a dump and not repaired', async () => {
    await using bus = await freshBus()
    await (await bus.pubsub.subscribe('a', 'd')).close()
    await client.query(`update "${bus.schema}".consumer_offsets set lo = '9000000000:9000000000:'`)
    expect(levels(await look(bus.schema), 'restored')).toEqual(['error'])
  })

  test('in which the role may do nothing, or only look', async () => {
    await using bus = await freshBus()
    const name = `diagnosed_${bus.schema}`
    await client.query(`create role "${name}" login password 'x'`)
    await client.query(
      `grant select on "${bus.schema}".migrations, "${bus.schema}".meta to "${name}"; grant usage on schema "${bus.schema}" to "${name}"`,
    )
    const url = Object.assign(new URL(server.connectionString), { username: name, password: 'x' })
    const findings = await PostgresBus.diagnose({ connectionString: url.href, schema: bus.schema })
    // What could not be looked at is not well.
    expect(levels(findings, 'schema')).toEqual(['warning'])
    expect(of(findings, 'role')).toMatchObject([{ level: 'error', advice: expect.stringContaining('grant_role') }])
    expect(levels(findings, 'queues')).toEqual(['warning'])
    await client.query(`select "${bus.schema}".grant_role('reader', '${name}')`)
    const [role] = of(await PostgresBus.diagnose({ connectionString: url.href, schema: bus.schema }), 'role')
    expect(role).toMatchObject({ level: 'ok', message: expect.stringMatching(/may do what a reader may$/) })
  })
})

describe('what wakes and what cleans', () => {
  test('LISTEN that is not to be had', async () => {
    await using bus = await freshBus()
    const findings = await look(bus.schema, { listenConnectionString: 'postgres://127.0.0.1:1/nowhere' })
    expect(of(findings, 'listen')).toMatchObject([{ level: 'warning', advice: expect.stringContaining('listenConnectionString') }])
  })

  test('LISTEN that is not heard', async () => {
    await using bus = await freshBus()
    // Another database of the server: what is notified here does not get there, as through a pooler.
    const url = Object.assign(new URL(server.connectionString), { pathname: '/template1' })
    const findings = await look(bus.schema, { listenConnectionString: url.href })
    expect(of(findings, 'listen')).toMatchObject([{ level: 'warning', message: expect.stringContaining('hears nothing') }])
  })

  test('a transaction that is open for long, and a prepared one', async () => {
    await using bus = await freshBus()
    await using old = await session(server.connectionString, { applicationName: 'the old one' })
    expect(levels(await look(bus.schema, { thresholds: { oldSnapshotMs: 60_000 } }), 'old_snapshot')).toEqual(['ok'])
    await old.query('begin isolation level repeatable read')
    await old.query('select 1')
    const prepared = `p_${bus.schema}`
    await client.query(`begin; select pg_current_xact_id(); prepare transaction '${prepared}'`)
    try {
      const findings = of(await look(bus.schema, { thresholds: { oldSnapshotMs: 0 } }), 'old_snapshot')
      const [held] = findings.filter(({ message }) => message.includes('the old one'))
      expect(held).toMatchObject({ level: 'warning', advice: expect.stringContaining(`pg_terminate_backend(${old.pid})`) })
      expect(findings.some(({ message }) => message.startsWith(`prepared transaction ${prepared}`))).toBe(true)
      expect(levels(await look(bus.schema), 'old_snapshot')).toEqual(['ok'])
    } finally {
      await client.query(`rollback prepared '${prepared}'`)
    }
  })

  test('dead rows that are not vacuumed away', async () => {
    await using bus = await freshBus()
    await bus.jobs.enqueueMany(
      'bloated',
      Array.from({ length: 200 }, () => ({ payload: 'x' })),
    )
    for (const job of await bus.jobs.claimMany('bloated', 'w', 30_000, { limit: 200 })) await job.ack()
    const thresholds = { deadRows: 100 }
    const findings = await eventually(
      async () => {
        // What a backend has done is told after a while, or when it ends.
        await client.query('select pg_stat_clear_snapshot()')
        const seen = of(await look(bus.schema, { thresholds }), 'bloat')
        return seen[0]?.level === 'warning' ? seen : null
      },
      { timeoutMs: 20_000, what: 'dead rows in the statistics' },
    )
    expect(findings?.[0]?.message).toMatch(/^table jobs holds \d+ dead rows beside 0 live ones.*last vacuumed: never$/)
    expect(levels(await look(bus.schema), 'bloat')).toEqual(['ok'])
    await client.query(`vacuum "${bus.schema}".jobs`)
    await eventually(async () => levels(await look(bus.schema, { thresholds }), 'bloat')[0] === 'ok', {
      timeoutMs: 20_000,
      what: 'the vacuum in the statistics',
    })
  })

  test('a notification queue that fills up, and who keeps it full', async () => {
    await using bus = await freshBus()
    await using sleeper = await session(server.connectionString)
    for (const step of ['listen sleepy', 'begin', 'select 1']) await sleeper.query(step)
    for (let n = 0; n < 40; n++) await client.query(`select pg_notify('sleepy', repeat('x', 7900))`)
    const [finding] = of(await look(bus.schema), 'notify_queue')
    expect(finding).toMatchObject({ level: 'warning', advice: expect.stringContaining(String(sleeper.pid)) })
    await sleeper.query('commit')
    await eventually(async () => levels(await look(bus.schema), 'notify_queue')[0] === 'ok', { what: 'the queue being emptied' })
  })
})

describe('what the bus holds', () => {
  test('a durable that nobody reads, and what waits for it', async () => {
    await using bus = await freshBus()
    await (await bus.pubsub.subscribe('left.>', 'left-behind')).close()
    await bus.pubsub.publish('left.one', 'x')
    expect(levels(await look(bus.schema), 'abandoned_durable')).toEqual(['ok'])
    await client.query(`update "${bus.schema}".consumer_offsets set last_active_at = now() - interval '3 days'`)
    const [finding] = of(await look(bus.schema), 'abandoned_durable')
    expect(finding).toMatchObject({ level: 'warning', advice: expect.stringContaining('consumers rm left-behind') })
    expect(finding?.message).toContain('"left-behind" (left.>) for 3 days; 1 messages wait')
  })

  test('dead jobs, jobs that wait for a worker, and a paused queue', async () => {
    await using bus = await freshBus()
    await bus.jobs.enqueue('broken', { payload: 'x' })
    await (await bus.jobs.claim('broken', 'w', 30_000))?.deadLetter('r')
    await bus.jobs.enqueue('idle', { payload: 'x' })
    await bus.jobs.enqueue('held', { payload: 'x' })
    await bus.admin.pauseQueue('held')
    expect(levels(await look(bus.schema), 'waiting_queue')).toEqual([])
    await client.query(`update "${bus.schema}".jobs set visible_at = now() - interval '1 hour' where died_at is null`)
    const findings = await look(bus.schema)
    expect(of(findings, 'dead_jobs')).toMatchObject([{ level: 'warning', message: 'queue "broken" holds 1 dead job' }])
    expect(of(findings, 'waiting_queue')).toMatchObject([
      {
        message: 'a job of queue "idle" has been ready for 60 min; 1 are ready and 0 running',
        advice: expect.stringContaining('start a worker'),
      },
    ])
    expect(of(findings, 'paused_queue')).toMatchObject([{ level: 'notice', advice: 'klieo-bus queues resume held' }])
    expect(of(findings, 'queues')).toEqual([])
  })
})

test('arguments are checked', async () => {
  for (const thresholds of [{ waitingMs: -1 }, { deadRows: 0.5 }, 'x']) {
    await expect(PostgresBus.diagnose({ connectionString: databaseUrl(), thresholds } as never)).rejects.toMatchObject({
      code: 'invalid_argument',
    })
  }
})

test('a pool of the app’s own is used and not ended', async () => {
  const pool = new pg.Pool({ connectionString: server.connectionString, max: 1 })
  await PostgresBus.diagnose({ pool })
  expect((await pool.query('select 1 as one')).rows).toEqual([{ one: 1 }])
  await pool.end()
})

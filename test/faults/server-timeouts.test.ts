/** What waits too long for the server: cancelled by statement_timeout, refused by lock_timeout. Typed, whole, and nothing left behind. */

import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { BusError, type ClaimedJob, type Lease, type Msg, PostgresBus, type PostgresTx } from '../../src/index.ts'
import { outcome, Taker, text } from '../postgres/support/outcome.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

const url = databaseUrl()
const schema = freshSchema()
const role = `timeouts_${schema}`
const LONG_MS = 120_000

let admin: Session
let roleUrl: string

beforeAll(async () => {
  admin = await session(url)
  await admin.query(`create role ${role} login password 'p'`)
  await admin.query(`do $$ begin execute format('grant create on database %I to ${role}', current_database()); end $$`)
  const own = new URL(url)
  own.username = role
  own.password = 'p'
  roleUrl = own.href
  await (await PostgresBus.connect({ connectionString: roleUrl, schema, maintenance: false })).close()
})
afterAll(async () => {
  await admin.query(`drop owned by ${role} cascade`)
  await admin.query(`drop role ${role}`)
  await admin[Symbol.asyncDispose]()
})

/** How many rows each table has. */
async function counts(): Promise<Record<string, number>> {
  const { rows } = await admin.query<{ tablename: string }>('select tablename from pg_tables where schemaname = $1 order by 1', [schema])
  const counted: Record<string, number> = {}
  for (const { tablename } of rows) {
    const [row] = (await admin.query<{ n: number }>(`select count(*)::int as n from ${schema}.${tablename}`)).rows
    counted[tablename] = row!.n
  }
  return counted
}

async function lockAll(holder: Session): Promise<void> {
  const { rows } = await admin.query<{ all: string }>(
    `select string_agg(format('%I.%I', schemaname, tablename), ', ' order by tablename) as all from pg_tables where schemaname = $1`,
    [schema],
  )
  await holder.query('begin')
  await holder.query(`lock table ${rows[0]!.all} in access exclusive mode`)
}

/** Neither statements nor transactions nor locks of the role's are left on the server, and no connection is out of the pool. */
async function nothingLeft(pool: pg.Pool): Promise<void> {
  await eventually(async () => {
    expect([pool.waitingCount, pool.totalCount - pool.idleCount]).toEqual([0, 0])
    const { rows } = await admin.query(
      `select a.state, a.query from pg_stat_activity a
       where a.usename = $1 and (a.state <> 'idle' or exists (
         select from pg_locks l where l.pid = a.pid and l.locktype in ('relation', 'tuple', 'transactionid')))`,
      [role],
    )
    expect(rows).toEqual([])
  })
}

interface Held {
  readonly message: Msg<PostgresTx>
  readonly naked: Msg<PostgresTx>
  readonly termed: Msg<PostgresTx>
  readonly job: ClaimedJob<PostgresTx>
  readonly nakedJob: ClaimedJob<PostgresTx>
  readonly deadJob: ClaimedJob<PostgresTx>
  readonly lease: Lease
  readonly released: Lease
  readonly givenBack: ClaimedJob<PostgresTx>
}

async function hold(bus: PostgresBus, name: string): Promise<Held> {
  const stream = await bus.pubsub.subscribe(name, name, { ackWaitMs: LONG_MS })
  const taker = new Taker(stream)
  for (const payload of ['message', 'naked', 'termed']) await bus.pubsub.publish(name, payload)
  const [message, naked, termed] = [await taker.expect(), await taker.expect(), await taker.expect()]
  await stream.close()
  await bus.jobs.enqueueMany(
    name,
    ['job', 'naked', 'dead', 'given back'].map((payload) => ({ payload })),
  )
  const [job, nakedJob, deadJob, givenBack] = (await bus.jobs.claimMany(name, 'w', LONG_MS, { limit: 4 })) as [
    ClaimedJob<PostgresTx>,
    ClaimedJob<PostgresTx>,
    ClaimedJob<PostgresTx>,
    ClaimedJob<PostgresTx>,
  ]
  const [lease, released] = [await bus.kv.lease(name, 'lease', LONG_MS), await bus.kv.lease(name, 'released', LONG_MS)]
  return { message, naked, termed, job, nakedJob, deadJob, lease, released, givenBack }
}

/** Every call there is that needs the server. */
function calls(bus: PostgresBus, name: string, held: Held): Record<string, () => Promise<unknown>> {
  return {
    publish: () => bus.pubsub.publish(name, 'late'),
    'publish with an id': () => bus.pubsub.publish(name, 'late', { msgId: `${name}-id` }),
    publishMany: () => bus.pubsub.publishMany([1, 2].map((n) => ({ subject: name, payload: `${n}` }))),
    subscribe: () => bus.pubsub.subscribe(name, `${name}-new`),
    'extend a message': () => held.message.extend(),
    'ack a message': () => held.message.ack(),
    'nak a message': () => held.naked.nak(0),
    'term a message': () => held.termed.term(),
    enqueue: () => bus.jobs.enqueue(name, { payload: 'late' }),
    'enqueue with a key': () => bus.jobs.enqueue(name, { payload: 'late', dedupKey: 'key' }),
    enqueueMany: () => bus.jobs.enqueueMany(name, [{ payload: 'late' }, { payload: 'late', dedupKey: 'other' }]),
    claim: () => bus.jobs.claim(name, 'w', LONG_MS),
    'heartbeat a job': () => held.job.heartbeat(),
    'ack a job': () => held.job.ack(),
    'nak a job': () => held.nakedJob.nak(0),
    'dead-letter a job': () => held.deadJob.deadLetter('by hand'),
    put: () => bus.kv.put(name, 'put', 'v'),
    'put with a ttl': () => bus.kv.put(name, 'ttl', 'v', { ttlMs: LONG_MS }),
    cas: () => bus.kv.cas(name, 'cas', 'v', null),
    delete: () => bus.kv.delete(name, 'deleted'),
    get: () => bus.kv.get(name, 'put'),
    keys: async () => {
      for await (const _ of bus.kv.keys(name));
    },
    lease: () => bus.kv.lease(name, 'new', LONG_MS),
    'heartbeat a lease': () => held.lease.heartbeat(),
    'release a lease': () => held.released.release(),
    'give a job back': () => held.givenBack.lease.release(),
    request: () => bus.requestReply.request(`${name}.asked`, 'asked', { timeoutMs: 20_000 }),
  }
}

describe('a lock that is held on every table', () => {
  test.each([
    ['statement_timeout', 'read committed'],
    ['statement_timeout', 'serializable'],
    ['lock_timeout', 'read committed'],
    ['lock_timeout', 'serializable'],
  ])(
    'P1 P7 J1 J6 K4 K5 %s where the default is %s: every call is rejected with timeout, writes nothing and leaves nothing, and works once the lock is gone',
    async (setting, isolation) => {
      const name = `${setting.split('_')[0]}-${isolation.split(' ')[0]}`
      await admin.query(`alter role ${role} set ${setting} = '1200ms'`)
      await admin.query(`alter role ${role} set default_transaction_isolation = '${isolation}'`)
      const pool = new pg.Pool({ connectionString: roleUrl, max: 4 })
      const bus = await PostgresBus.connect({ pool, schema, maintenance: false, pollIntervalMs: 100 })
      try {
        await bus.kv.put(name, 'deleted', 'v')
        await using responder = await bus.requestReply.respond(`${name}.asked`, ({ payload }) => payload)
        const held = await hold(bus, name)
        const all = calls(bus, name, held)
        const before = await counts()
        await using holder = await session(url)
        await lockAll(holder)
        const rejected = await Promise.all(
          Object.entries(all).map(async ([call, make]) => {
            const error = await make().then(
              () => 'it succeeded',
              (reason: unknown) => reason,
            )
            return [call, error] as const
          }),
        )
        for (const [call, error] of rejected) {
          expect(error, call).toBeInstanceOf(BusError)
          // A cancelled statement may be cancelled again, for as long as the setting is what it is; a lock is let go.
          expect.soft(error, call).toMatchObject({ code: 'timeout', retryable: setting === 'lock_timeout' })
        }
        await holder.query('rollback')
        expect(await counts()).toEqual(before)
        await eventually(async () => expect(await outcome(bus.kv.get(name, 'put'))).toBe('ok'))

        // The same calls, on the same handles: nothing counts as done that was not.
        for (const [call, make] of Object.entries(all)) expect.soft(await outcome(make()), call).toBe('ok')
        expect(await outcome(bus.kv.lease(name, 'released', LONG_MS))).toBe('ok')
        const { rows: states } = await admin.query(`select state from ${schema}.job_details where id = $1`, [held.givenBack.id])
        expect(states).toEqual([{ state: 'ready' }])
        const { rows } = await admin.query(`select payload_text from ${schema}.message_details where subject = $1`, [name])
        expect(rows.map(({ payload_text: payload }) => payload as string).sort()).toEqual(
          ['message', 'naked', 'termed', 'late', 'late', '1', '2'].sort(),
        )
        await responder.close()
        await nothingLeft(pool)
      } finally {
        await bus.close()
        await pool.end()
        await admin.query(`alter role ${role} reset all`)
      }
    },
    60_000,
  )
})

describe('a statement_timeout so short that it hits anywhere', () => {
  test.each(['read committed', 'repeatable read'])(
    'P1 J1 J5 K4 where the default is %s: what is rejected was not written, what resolved was, message, job, key and record alike',
    async (isolation) => {
      const name = `short-${isolation.split(' ')[0]}`
      const pool = new pg.Pool({ connectionString: roleUrl, max: 4 })
      await using bus = await PostgresBus.connect({ pool, schema, maintenance: false })
      await admin.query(`alter role ${role} set default_transaction_isolation = '${isolation}'`)
      // Some pass and some do not, on any machine: each round takes its own from what a statement takes here.
      const startedAt = performance.now()
      await bus.pubsub.publish(`${name}-warm`, 'x'.repeat(1_000))
      const tookMs = performance.now() - startedAt
      const expected = { messages: new Set<string>(), jobs: new Set<string>(), keys: new Set<string>() }
      const codes = new Set<string>()
      let writes = 0
      for (const share of [0.1, 0.3, 0.6, 1, 3]) {
        const ms = Math.max(1, Math.round(tookMs * share))
        await admin.query(`alter role ${role} set statement_timeout = '${ms}ms'`)
        const short = new pg.Pool({ connectionString: roleUrl, max: 4 })
        short.on('error', () => {})
        const hurried = await PostgresBus.connect({ pool: short, schema, maintenance: false, migrate: false }).catch((error: BusError) => {
          expect(error.code).toBe('timeout')
          return undefined
        })
        for (let n = 0; hurried && n < 40; n++) {
          const payload = `${share}-${n}`
          writes++
          const [message, job, key] = await Promise.all([
            outcome(hurried.pubsub.publish(name, payload, { msgId: `${name}-${payload}` })),
            outcome(hurried.jobs.enqueue(name, { payload, dedupKey: payload })),
            outcome(hurried.kv.put(name, payload, payload)),
          ])
          if (message === 'ok') expected.messages.add(payload)
          if (job === 'ok') expected.jobs.add(payload)
          if (key === 'ok') expected.keys.add(payload)
          for (const code of [message, job, key]) codes.add(code)
        }
        if (hurried) await nothingLeft(short)
        await hurried?.close()
        await short.end()
      }
      await admin.query(`alter role ${role} reset all`)
      for (const code of codes) expect(['ok', 'timeout']).toContain(code)
      expect(writes).toBeGreaterThan(0)
      const payloads = async (table: string, where: string, column = `convert_from(payload, 'UTF8')`) => {
        const { rows } = await admin.query(`select ${column} as payload from ${schema}.${table} where ${where} = $1`, [name])
        return rows.map(({ payload }) => payload as string).sort()
      }
      expect(await payloads('messages', 'subject')).toEqual([...expected.messages].sort())
      expect(await payloads('jobs', 'queue')).toEqual([...expected.jobs].sort())
      expect(await payloads('kv_entries', 'bucket', 'key')).toEqual([...expected.keys].sort())
      const keys: string[] = []
      for await (const key of bus.kv.keys(`dedup.${name}`)) keys.push(key)
      expect(keys.sort()).toEqual([...expected.jobs].sort())
      // A record of an id without its message would refuse it for ever.
      for (const payload of ['0.1-0', '0.1-1', '3-0']) {
        const { duplicate } = await bus.pubsub.publish(name, payload, { msgId: `${name}-${payload}` })
        expect(duplicate, payload).toBe(expected.messages.has(payload))
      }
      await using stream = await bus.pubsub.subscribe(name, name)
      expect(text((await new Taker(stream).expect()).payload)).toBeTruthy()
      await pool.end().catch(() => {})
    },
    60_000,
  )
})

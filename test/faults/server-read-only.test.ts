/** Transactions that are read-only by default: a setting of a role or a database, and not a standby. */

import pg from 'pg'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { BusError, PostgresBus } from '../../src/index.ts'
import { outcome, Taker, text } from '../postgres/support/outcome.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

const schema = freshSchema()
const role = `reader_${schema}`
let admin: Session
let url: string

beforeAll(async () => {
  admin = await session(databaseUrl())
  await admin.query(`create role ${role} login password 'p'`)
  await admin.query(`do $$ begin execute format('grant create on database %I to ${role}', current_database()); end $$`)
  const own = new URL(databaseUrl())
  own.username = role
  own.password = 'p'
  url = own.href
})
afterAll(async () => {
  await admin.query(`drop owned by ${role} cascade`)
  await admin.query(`drop role ${role}`)
  await admin[Symbol.asyncDispose]()
})

const readOnly = (on: boolean) => admin.query(`alter role ${role} set default_transaction_read_only = ${on ? 'on' : 'off'}`)

async function everythingWorks(bus: PostgresBus, name: string): Promise<void> {
  await using stream = await bus.pubsub.subscribe(name, name)
  await bus.pubsub.publish(name, 'm')
  const message = await new Taker(stream).expect()
  await message.ack()
  await bus.jobs.enqueue(name, { payload: 'j', dedupKey: 'k' })
  await (await bus.jobs.claim(name, 'w', 60_000))!.ack()
  await bus.kv.cas(name, 'k', 'w', await bus.kv.put(name, 'k', 'v'))
  await (await bus.kv.lease(name, 'l', 60_000)).release()
  await using _responder = await bus.requestReply.respond(name, ({ payload }) => payload)
  expect(text(await bus.requestReply.request(name, 'r', { timeoutMs: 10_000 }))).toBe('r')
}

test('P1 J1 K4 R1 the bus says read write where the default is read only, from the first migration on', async () => {
  await readOnly(true)
  await using bus = await PostgresBus.connect({ connectionString: url, schema })
  await everythingWorks(bus, 'by-default')
  await readOnly(false)
})

test('P1 J1 K4 R1 so it does when the default changes under its feet', async () => {
  await using bus = await PostgresBus.connect({ connectionString: url, schema, pollIntervalMs: 200 })
  await everythingWorks(bus, 'before')
  await readOnly(true)
  await admin.query('select pg_terminate_backend(pid) from pg_stat_activity where usename = $1', [role])
  await eventually(async () => expect(await outcome(bus.pubsub.publish('changed', 'm'))).toBe('ok'))
  await everythingWorks(bus, 'changed')
  await readOnly(false)
})

test('P1 in a transaction of the caller’s that is read only a write is refused, and told what to do', async () => {
  await using bus = await PostgresBus.connect({ connectionString: url, schema, maintenance: false })
  const client = new pg.Client({ connectionString: url })
  await client.connect()
  await client.query('begin read only')
  const error = await bus.pubsub.publish('read-only', 'm', { tx: client }).then(
    () => undefined,
    (reason: unknown) => reason,
  )
  expect(error).toBeInstanceOf(BusError)
  expect((error as BusError).retryable).toBe(false)
  expect((error as BusError).message).toMatch(/read write/)
  await client.query('rollback')
  await client.end()
})

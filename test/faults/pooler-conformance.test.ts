/**
 * The contract through a pooler in transaction mode, with no direct connection anywhere: by polling alone.
 *
 * The whole suite, but for the tests of how soon a notification wakes a stream: there is none here, and P14 says that without one a
 * delivery may take the poll interval, which is the test's own choice.
 */

import pg from 'pg'
import { afterAll, describe, expect, test } from 'vitest'
import { PostgresBus, type PostgresBusOptions, type PostgresTx } from '../../src/index.ts'
import { type ConformanceRunner, conformance } from '../../src/testing/conformance/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { session } from '../support/sessions.ts'
import { findPgBouncer, PgBouncer } from './support/network/pgbouncer.ts'

const installed = await findPgBouncer()
const OF_NOTIFICATIONS = /^P14 .* within 50 ms/
/** A connect takes two seconds here, of waiting for a notification that does not come, so it is done while other tests run. */
const AHEAD = 30

test.skipIf(installed)('SKIPPED: pgbouncer is not installed, so nothing here was tested', { fails: true }, () => {
  expect(installed).toBeDefined()
})

if (installed) {
  const pooler = await PgBouncer.start(installed, databaseUrl())
  const { connectionString } = pooler
  const schema = freshSchema()
  const connect = (options: PostgresBusOptions = {}) =>
    PostgresBus.connect({ connectionString, schema, preparedStatements: false, pollIntervalMs: 30, ...options })
  const first = await connect()
  const { supports } = first
  await first.close()

  const stock: Promise<PostgresBus>[] = []
  const order = () => {
    const ordered = connect()
    ordered.catch(() => {}) // whoever takes it hears of it
    stock.push(ordered)
  }
  for (let n = 0; n < AHEAD; n++) order()
  const take = () => {
    order()
    return stock.shift() as Promise<PostgresBus>
  }

  afterAll(async () => {
    await Promise.all(stock.map(async (ordered) => (await ordered).close()))
    await pooler[Symbol.asyncDispose]()
  })

  test('R1 responders count as live by signs of life: the bus has seen that no session here is its own, and polls', async () => {
    await using bus = await take()
    await using _responder = await bus.requestReply.respond('mode', () => '')
    await using observer = await session(databaseUrl())
    const { rows } = await observer.query(`select alive_until is not null as "bySigns" from ${schema}.responders where filter = 'mode'`)
    expect(rows).toEqual([{ bySigns: true }])
  })

  const runner: ConformanceRunner = {
    describe,
    test: Object.assign(
      (name: string, body: () => Promise<void>) =>
        OF_NOTIFICATIONS.test(name) ? test.skip(`${name} (SKIPPED: by polling alone it takes the poll interval)`, body) : test(name, body),
      { skip: test.skip },
    ),
  }

  conformance<PostgresTx>(runner, {
    name: 'PostgresBus behind PgBouncer',
    supports,
    connect: (options) => (options ? connect(options) : take()),
    async begin() {
      const client = new pg.Client({ connectionString })
      await client.connect()
      await client.query('begin')
      const end = async (how: 'commit' | 'rollback') => {
        await client.query(how)
        await client.end()
      }
      return { tx: client, commit: () => end('commit'), rollback: () => end('rollback') }
    },
  })
}

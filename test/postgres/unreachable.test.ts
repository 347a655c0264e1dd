/** A server that takes a connection and then says nothing, as behind a network that drops what it should carry. */

import { once } from 'node:events'
import pg from 'pg'
import { expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { session } from '../support/sessions.ts'
import { outcome } from './support/outcome.ts'
import { Relay } from './support/relay.ts'

test('P1 a publish in a transaction goes on where the bus gets no answer of its own: it looks at the server in that transaction', async () => {
  const schema = freshSchema()
  await using relay = await Relay.start(databaseUrl())
  await using caller = await session(databaseUrl())
  const pool = new pg.Pool({ connectionString: relay.connectionString, idleTimeoutMillis: 0 })
  const bus = await PostgresBus.connect({ pool, schema, maintenance: false })
  try {
    const lost = once(pool, 'error').catch((error: unknown) => error)
    relay.freeze()
    relay.cut()
    // The bus heard of it, too, and wants to know whether it is still the same server.
    await lost
    await caller.query('begin')
    expect(await outcome(bus.pubsub.publish('s', 'p', { tx: caller }))).toBe('ok')
    await caller.query('commit')
    relay.thaw()
    expect((await caller.query(`select count(*)::int as n from ${schema}.messages`)).rows).toEqual([{ n: 1 }])
  } finally {
    await bus.close()
    await pool.end()
    await caller.query(`drop schema ${schema} cascade`)
  }
}, 60_000)

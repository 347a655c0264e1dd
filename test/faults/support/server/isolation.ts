/** The conformance suite where the role's transactions are something else than READ COMMITTED by default. */

import pg from 'pg'
import { afterAll, describe, test } from 'vitest'
import { PostgresBus, type PostgresTx } from '../../../../src/index.ts'
import { conformance } from '../../../../src/testing/conformance/index.ts'
import { databaseUrl, freshSchema } from '../../../support/server.ts'
import { session } from '../../../support/sessions.ts'

export async function conformanceWhereTheDefaultIs(isolation: 'serializable' | 'repeatable read'): Promise<void> {
  const schema = freshSchema()
  const role = `isolated_${schema}`
  const url = new URL(databaseUrl())
  {
    await using admin = await session(databaseUrl())
    await admin.query(`create role ${role} login password 'p'`)
    await admin.query(`alter role ${role} set default_transaction_isolation = '${isolation}'`)
    await admin.query(`do $$ begin execute format('grant create on database %I to ${role}', current_database()); end $$`)
  }
  url.username = role
  url.password = 'p'
  const connectionString = url.href
  const bus = await PostgresBus.connect({ connectionString, schema })
  const { supports } = bus
  await bus.close()
  afterAll(async () => {
    await using admin = await session(databaseUrl())
    await admin.query(`drop owned by ${role} cascade`)
    await admin.query(`drop role ${role}`)
  })
  conformance<PostgresTx>(
    { describe, test: Object.assign((name: string, body: () => Promise<void>) => test(name, () => repeated(body)), { skip: test.skip }) },
    {
      name: `PostgresBus where the role's default isolation is ${isolation}`,
      supports,
      connect: (options) => PostgresBus.connect({ connectionString, schema, ...options }),
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
    },
  )
}

const SERIALIZATION_FAILURE = '40001'
const TRIES = 5

/** A transaction of the test's own may be refused at its commit where everybody's is serializable: whoever asked for that repeats it. */
async function repeated(body: () => Promise<void>): Promise<void> {
  for (let tries = 1; ; tries++) {
    try {
      return await body()
    } catch (error) {
      if ((error as { code?: unknown }).code !== SERIALIZATION_FAILURE || tries === TRIES) throw error
    }
  }
}

import pg from 'pg'
import { describe, test } from 'vitest'
import { PostgresBus, type PostgresTx } from '../../src/index.ts'
import { conformance } from '../../src/testing/conformance/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'

const connectionString = databaseUrl()
const schema = freshSchema()
const bus = await PostgresBus.connect({ connectionString, schema })
const { supports } = bus
await bus.close()

conformance<PostgresTx>(
  { describe, test },
  {
    name: 'PostgresBus',
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

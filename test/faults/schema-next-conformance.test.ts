/**
 * The present code on the schema of a next release that calls itself compatible, with every table's columns in another order: the
 * whole of the contract. What reads columns by position fails here.
 */

import pg from 'pg'
import { describe, expect, test } from 'vitest'
import { PostgresBus, type PostgresTx } from '../../src/index.ts'
import { conformance } from '../../src/testing/conformance/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { session } from '../support/sessions.ts'
import { reorderedNextSchema } from './support/network/releases.ts'

const connectionString = databaseUrl()
const schema = freshSchema()
{
  await using client = await session(connectionString)
  await reorderedNextSchema(client, schema)
}
const first = await PostgresBus.connect({ connectionString, schema })
const { supports } = first
await first.close()

test('the schema is another one: further columns and functions, and no table that begins as the present release’s does', async () => {
  const present = freshSchema()
  await PostgresBus.migrate({ connectionString, schema: present })
  await using client = await session(connectionString)
  const columns = `select c.relname || '.' || string_agg(a.attname, ',' order by a.attnum) as columns
    from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
    where c.relnamespace = $1::regnamespace and c.relkind = 'r' and c.relname not like 'migrations%' group by c.relname order by 1`
  const read = async (name: string) => (await client.query<{ columns: string }>(columns, [name])).rows.map((row) => row.columns)
  const here = await read(schema)
  for (const table of await read(present)) {
    const [name, list] = table.split('.') as [string, string]
    expect(here).toContain(`${name}.${list.split(',').reverse().join(',')},next_note`)
  }
  const { rows } = await client.query(`select from pg_proc where pronamespace = $1::regnamespace and proname like 'next_%'`, [schema])
  expect(rows.length).toBeGreaterThan(0)
})

conformance<PostgresTx>(
  { describe, test },
  {
    name: 'PostgresBus on the schema of a next release',
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

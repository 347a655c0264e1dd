/** docs/enqueue-from-a-trigger.md against psql, and a worker that is a shell and psql. */

import { spawn } from 'node:child_process'
import pg from 'pg'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { FreshDatabase } from './fresh-database.ts'
import { differences, findPsql } from './psql.ts'

const psql = await findPsql()
let database: FreshDatabase

beforeAll(async () => {
  database = await FreshDatabase.make()
})

afterAll(() => database?.[Symbol.asyncDispose]())

test.skipIf(psql === undefined)('psql prints what enqueue-from-a-trigger.md says (skipped without a psql)', async () => {
  expect(await differences('enqueue-from-a-trigger.md', psql!, database.url)).toBe('')
})

/** Claims, heartbeats and acks until nothing is left; each statement is a connection of its own. Every fifth job fails at its first attempt. */
const SHELL_WORKER = `
set -eu
sql() { "$PSQL" -X -A -t -q -v ON_ERROR_STOP=1 -F ' ' "$@" "$DATABASE_URL"; }
while :; do
  claimed=$(echo "select id, attempt, token from klieo.claim('shell', :'me', 60000)" | sql -v me="$1")
  if [ -z "$claimed" ]; then
    left=$(echo "select count(*) from klieo.job_details where queue = 'shell' and state <> 'dead'" | sql)
    if [ "$left" = 0 ]; then exit 0; fi
    continue
  fi
  set -- "$1" $claimed
  [ -n "$(echo "select klieo.heartbeat(:id, :'token')" | sql -v id="$2" -v token="$4")" ]
  if [ $(($2 % 5)) = 0 ] && [ "$3" = 1 ]; then
    settled=$(echo "select klieo.nak(:id, :'token', 0, 'at first')" | sql -v id="$2" -v token="$4")
  else
    settled=$(printf '%s\\n' "insert into done values (:id, :attempt);" "select klieo.ack(:id, :'token');" | sql -1 -f - -v id="$2" -v attempt="$3" -v token="$4")
  fi
  [ "$settled" = t ]
  [ "$(echo "select klieo.ack(:id, :'token')" | sql -v id="$2" -v token="$4")" = f ]
done`

test.skipIf(psql === undefined)(
  'J2 J6 three workers made of a shell and psql do each job once (skipped without a psql)',
  async () => {
    const client = new pg.Client({ connectionString: database.url })
    await client.connect()
    try {
      await client.query('create table done (id bigint primary key, attempt int not null)')
      const { rows: jobs } = await client.query<{ id: string }>(
        `select klieo.enqueue('shell', convert_to(n::text, 'utf8')) as id from generate_series(1, 10) n`,
      )
      const ends = ['one', 'two', 'three'].map((name) => {
        const child = spawn('bash', ['-c', SHELL_WORKER, 'worker', name], {
          env: { ...process.env, PSQL: psql!, DATABASE_URL: database.url },
        })
        let said = ''
        child.stderr.setEncoding('utf8').on('data', (text: string) => {
          said += text
        })
        return new Promise<string>((resolve) => child.on('close', (code) => resolve(`${code} ${said}`)))
      })
      expect(await Promise.all(ends)).toEqual(['0 ', '0 ', '0 '])
      const { rows: done } = await client.query('select id, attempt from done order by id')
      expect(done).toEqual(jobs.map(({ id }) => ({ id, attempt: Number(id) % 5 === 0 ? 2 : 1 })))
    } finally {
      await client.end()
    }
  },
  60_000,
)

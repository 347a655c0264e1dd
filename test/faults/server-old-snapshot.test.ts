/** A transaction with an old snapshot is open all the time: no row that is done can be removed. Measured in pages read, not in time. */

import { afterAll, beforeAll, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { rival } from '../postgres/support/rival.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import type { Session } from '../support/sessions.ts'

const connectionString = databaseUrl()
const schema = freshSchema()
const JOBS = 50_000
const BATCH = 100

let client: Session
let pin: Session
beforeAll(async () => {
  client = await rival(connectionString)
  pin = await rival(connectionString)
  await (await PostgresBus.connect({ connectionString, schema, maintenance: false })).close()
})
afterAll(async () => {
  await pin[Symbol.asyncDispose]()
  await client[Symbol.asyncDispose]()
})

interface Plan {
  readonly 'Shared Hit Blocks': number
  readonly 'Shared Read Blocks': number
}

/** Claims a batch and acks it. @returns the pages that the claim read */
async function round(queue: string): Promise<number> {
  const { rows } = await client.query<{ 'QUERY PLAN': [{ Plan: Plan }] }>(
    `explain (analyze, buffers, timing off, format json)
     insert into ${schema}_claimed select id, token from ${schema}.claim_jobs('${queue}', 'w', 600000, ${BATCH})`,
  )
  const { rowCount } = await client.query(`select ${schema}.ack_jobs(array_agg(id), array_agg(token)) from ${schema}_claimed`)
  await client.query(`truncate ${schema}_claimed`)
  expect(rowCount).toBe(BATCH)
  const plan = rows[0]!['QUERY PLAN'][0].Plan
  return plan['Shared Hit Blocks'] + plan['Shared Read Blocks']
}

function quantile(values: readonly number[], share: number): number {
  return values.toSorted((a, b) => a - b)[Math.min(values.length - 1, Math.floor(values.length * share))] as number
}

test('J2 with an old snapshot held over 50,000 jobs, a claim at the end reads no more than three times what one at the beginning does', async () => {
  await client.query(`create temporary table ${schema}_claimed (id bigint, token uuid)`)
  await client.query(
    `insert into ${schema}.jobs (queue, run_at, visible_at, payload)
     select 'old', at, at, '\\x00' from generate_series(1, ${JOBS}) n, lateral (select now() - interval '1 hour' + n * interval '10 ms') as due(at)`,
  )
  await pin.query('begin isolation level repeatable read')
  await pin.query('select count(*) from pg_class')
  const pages: number[] = []
  for (let done = 0; done < JOBS; done += BATCH) pages.push(await round('old'))
  // Warm, and before dead rows have come together.
  const baseline = quantile(pages.slice(2, 12), 0.5)
  const later = pages.slice(100)
  // Now and then one looks from the very beginning, and finds out where to begin: so not the dearest, but nearly all.
  expect(quantile(later, 0.5)).toBeLessThan(3 * baseline)
  expect(quantile(later, 0.9)).toBeLessThan(3 * baseline)
  await pin.query('rollback')
  // Together, looks included, they cost at the end what they cost at the beginning; past all that is dead it would be ever more.
  const fifth = pages.length / 5
  const sum = (values: readonly number[]) => values.reduce((total, value) => total + value, 0)
  expect(sum(pages.slice(-fifth))).toBeLessThan(2 * sum(pages.slice(0, fifth)))
}, 180_000)

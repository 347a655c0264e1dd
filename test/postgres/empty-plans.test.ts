import { afterAll, beforeAll, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import type { Session } from '../support/sessions.ts'
import { rival } from './support/rival.ts'

const connectionString = databaseUrl()
const schema = freshSchema()
let observer: Session
let bus: PostgresBus

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
  observer = await rival(connectionString)
  // As the functions have it, and as autovacuum leaves an idle bus.
  await observer.query(
    'set enable_seqscan = off; set enable_bitmapscan = off; set enable_mergejoin = off; set plan_cache_mode = force_generic_plan',
  )
  await observer.query(`set search_path = ${schema}`)
  for (const table of ['deliveries', 'jobs']) await observer.query(`vacuum analyze ${table}`)
})
afterAll(async () => {
  await observer?.[Symbol.asyncDispose]()
  await bus?.close()
})

async function indexes(name: string, types: string, statement: string, values: string): Promise<string[]> {
  await observer.query(`prepare ${name}(${types}) as ${statement}`)
  const { rows } = await observer.query(`explain (costs off) execute ${name}(${values})`)
  return (rows as { 'QUERY PLAN': string }[]).flatMap((row) => /Scan using (\w+)/.exec(row['QUERY PLAN'])?.[1] ?? [])
}

test('P7 deliveries are settled by their primary key, also by plans that were made while there were none', async () => {
  const many = 'delete from deliveries d where d.consumer_id = any($1) and d.seq = any($2) and d.token = any($3)'
  expect(await indexes('acks', 'int[], bigint[], uuid[]', many, `'{1}', '{1}', '{}'`)).toEqual(['deliveries_pkey'])
  const one = 'select from deliveries d where d.consumer_id = $1 and d.seq = $2 and d.token = $3 for update'
  expect(await indexes('one', 'int, bigint, uuid', one, `1, 1, null`)).toEqual(['deliveries_pkey'])
})

test('P5 redeliveries are found by their time', async () => {
  const due =
    'select from deliveries d where d.consumer_id + 0 = $1 and d.visible_at <= now() order by d.visible_at, d.seq limit $2 for no key update skip locked'
  expect(await indexes('due', 'int, int', due, '1, 1')).toEqual(['deliveries_due'])
  const any = 'select from deliveries d where d.consumer_id + 0 = $1 and d.visible_at <= now() and not d.final limit 1'
  expect(await indexes('any_due', 'int', any, '1')).toEqual(['deliveries_due'])
  // By the others all that is due to a durable would be read, or all that it has in flight.
  const final = 'select from deliveries d where d.consumer_id::bigint = $1 and d.visible_at <= now() and d.final limit 1'
  expect(await indexes('final_due', 'int', final, '1')).toEqual(['deliveries_final'])
})

test('A5 what waits of purged messages is found by durable and seq, not by a walk through all deliveries for each', async () => {
  await observer.query(`prepare purged(bigint[]) as
    select d.consumer_id, d.seq
    from deliveries d
    where d.consumer_id = any (array(select o.id from consumer_offsets o))
      and d.seq between (select min(c.seq) from unnest($1) as c(seq)) and (select max(c.seq) from unnest($1) as c(seq))
      and d.token is null
      and (d.seq in (select c.seq from unnest($1) as c(seq))) is true
    for update skip locked`)
  const { rows } = await observer.query(`explain (costs off) execute purged('{}')`)
  const plan = (rows as { 'QUERY PLAN': string }[]).map((row) => row['QUERY PLAN'].trim())
  expect(plan.filter((line) => line.includes('Scan using') && line.includes('deliveries'))).toEqual([
    expect.stringContaining('deliveries_pkey'),
  ])
  expect(plan.find((line) => line.startsWith('Index Cond: ((consumer_id = ANY'))).toContain('(seq >= ')
  expect(plan.find((line) => line.startsWith('Filter: ((token IS NULL)'))).toContain('hashed SubPlan')
})

test('J6 jobs are settled by their primary key', async () => {
  const one = 'delete from jobs j where j.id = $1 and j.token = $2'
  expect(await indexes('job', 'bigint, uuid', one, '1, null')).toEqual(['jobs_pkey'])
  const { rows } = await observer.query(`select proconfig from pg_proc where oid = 'ack_job'::regproc`)
  expect((rows[0] as { proconfig: string[] }).proconfig).toContain('enable_seqscan=off')
  const many = 'delete from jobs j where j.id = any($1) and j.token = any($2)'
  expect(await indexes('jobs', 'bigint[], uuid[]', many, `'{1}', '{}'`)).toEqual(['jobs_pkey'])
})

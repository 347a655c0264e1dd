/** What must not cost more the more there is: due redeliveries, and young or held messages. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import type { Session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { rival } from './support/rival.ts'

const connectionString = databaseUrl()
const schema = freshSchema()
let observer: Session
let bus: PostgresBus

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
  observer = await rival(connectionString)
  await observer.query(`set search_path = ${schema}`)
})
afterAll(async () => {
  await bus?.close()
  await observer?.[Symbol.asyncDispose]()
})

/** Rolled back. The first times of a session are not counted: they read the catalogue, too. */
async function buffers(statement: string): Promise<number> {
  let touched = 0
  for (let turn = 0; turn < 3; turn++) {
    await observer.query('begin')
    const { rows } = await observer.query(`explain (analyze, buffers, format json) ${statement}`)
    await observer.query('rollback')
    const [{ Plan: plan }] = (rows[0] as { 'QUERY PLAN': [{ Plan: Record<string, number> }] })['QUERY PLAN']
    touched = (plan['Shared Hit Blocks'] ?? 0) + (plan['Shared Read Blocks'] ?? 0)
  }
  return touched
}

async function durable(name: string): Promise<number> {
  await (await bus.pubsub.subscribe(`${name}.>`, name)).close()
  const { rows } = await observer.query('select id from consumer_offsets where durable = $1', [name])
  return (rows[0] as { id: number }).id
}

const publish = (subject: string, count: number) =>
  bus.pubsub.publishMany(Array.from({ length: count }, (_, n) => ({ subject, payload: `${n}` })))

describe('due redeliveries', () => {
  test('P5 a fetch reads those that it hands out, however many are due', async () => {
    const costs: number[] = []
    for (const [name, count] of [
      ['few', 200],
      ['many', 6_000],
    ] as const) {
      const id = await durable(name)
      await publish(`${name}.one`, count)
      while (Number((await observer.query('select count(*) as n from deliveries where consumer_id = $1', [id])).rows[0].n) < count) {
        await observer.query('select from fetch_messages($1, 1000, 60000, 100000, null, 16777216)', [id])
      }
      await observer.query(`update deliveries set visible_at = visible_at - interval '1 hour' where consumer_id = $1`, [id])
      await observer.query('vacuum deliveries, consumer_offsets')
      costs.push(await buffers(`select * from fetch_messages(${id}, 20, 60000, 100000, null, 16777216)`))
    }
    const [few, many] = costs as [number, number]
    // All of them would be thousands; an older server takes some more pages for a deeper index.
    expect(many).toBeLessThan(few + 200)
  })

  test('P8 a restored log hands out in the order of the log, and no two messages are due at the same moment', async () => {
    const id = await durable('restored')
    for (let n = 0; n < 30; n++) await publish('restored.one', 3)
    // As after a dump: a snapshot from the future, to which these were still running.
    await observer.query(
      `update consumer_offsets set lo = (
         select format('%s:%s:%s', min(m.tx::text::bigint), max(m.tx::text::bigint) + 1000000, string_agg(distinct lpad(m.tx::text, 20, '0'), ','))::pg_snapshot
         from messages m where m.subject = 'restored.one')
       where id = $1`,
      [id],
    )
    await observer.query('select rebase()')
    const { rows } = await observer.query(
      `select count(*)::int as waiting, count(distinct visible_at)::int as moments,
         array_agg(seq order by visible_at) = array_agg(seq order by seq) as in_order
       from deliveries where consumer_id = $1`,
      [id],
    )
    expect(rows[0]).toEqual({ waiting: 90, moments: 90, in_order: true })
  })
})

describe('retention', () => {
  const prune = (most: number) => `select prune_messages(3600000, ${most}) as count`

  test('P13 a round with nothing old to remove does not read the log', async () => {
    await observer.query('delete from consumer_offsets')
    await observer.query('delete from deliveries')
    await observer.query('delete from messages')
    await publish('young', 1_000)
    await observer.query('vacuum messages')
    const few = await buffers(prune(500))
    for (let n = 0; n < 10; n++) await publish('young', 1_000)
    await observer.query('vacuum messages')
    expect(await buffers(prune(500))).toBeLessThan(few + 10)
  })

  test('P13 messages that somebody holds do not keep the ones behind them', async () => {
    await observer.query('delete from messages')
    const id = await durable('holder')
    await publish('holder.one', 700)
    while (Number((await observer.query('select count(*) as n from deliveries where consumer_id = $1', [id])).rows[0].n) < 700) {
      await observer.query('select from fetch_messages($1, 1000, 60000, 100000, null, 16777216)', [id])
    }
    await publish('free', 500)
    await observer.query('delete from consumer_offsets')
    await observer.query(`update messages set published_at = now() - interval '2 hours' where subject in ('holder.one', 'free')`)
    await eventually(
      async () => {
        await observer.query(prune(300))
        const { rows } = await observer.query(`select subject, count(*)::int as n from messages group by subject`)
        expect(rows).toEqual([{ subject: 'holder.one', n: 700 }])
      },
      { timeoutMs: 25_000, everyMs: 100, what: 'what nobody holds being removed' },
    )
  })
})

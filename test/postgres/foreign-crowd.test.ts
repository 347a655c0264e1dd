/** Foreign workers and consumers that fail, forget, come too late and lose their connections: in the end each piece of work counted once. */

import { beforeAll, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { randomFrom } from './support/random.ts'

/** A failing run prints it. */
const SEED = Number(process.env.KLIEO_TEST_SEED ?? 9_001)
const SESSIONS = 6
const MAX_ATTEMPTS = 4
const WORK = 120
/** So short that some run out while their holder is at work. */
const LEASE_MS = 15
const schema = freshSchema()

interface Held {
  readonly id: string
  readonly attempt: number
  readonly token: string
}

beforeAll(async () => {
  await PostgresBus.migrate({ connectionString: databaseUrl(), schema })
  await using client = await session(databaseUrl())
  await client.query(`create table ${schema}.results (kind text not null, id bigint not null)`)
})

const inSchema = (text: string) => text.replaceAll('klieo.', `${schema}.`)

/** What one of the crowd does with what it holds; all of it may fail with its connection, and is then as if it had not begun. */
async function handle(client: Session, random: (most: number) => number, kind: 'job' | 'message', held: Held): Promise<void> {
  const settle = async (name: string, more = '') => {
    const call = kind === 'job' ? `klieo.${name}($1, $2${more})` : `klieo.${name}_message('readers', $1, $2${more})`
    return (await client.query(inSchema(`select ${call} as done`), [held.id, held.token])).rows[0].done as boolean
  }
  const chance = random(100)
  // Slow: by then it may be somebody else's.
  if (random(3) === 0) await client.query('select pg_sleep($1)', [(LEASE_MS * 2) / 1_000])
  if (chance < 10) return
  if (chance < 20) await settle('nak', ', 0')
  else if (chance < 25) await settle('release')
  else if (chance < 30) await settle(kind === 'job' ? 'heartbeat' : 'extend', `, ${LEASE_MS}`)
  else {
    await client.query('begin')
    await client.query(`insert into ${schema}.results values ($1, $2)`, [kind, held.id])
    const mine = await settle('ack')
    await client.query(mine && chance < 90 ? 'commit' : 'rollback')
    // A second time, or of what was rolled back: never both.
    if (mine && chance < 90) expect(await settle('ack')).toBe(false)
  }
}

async function takePart(index: number, kind: 'job' | 'message', isOver: (client: Session) => Promise<boolean>): Promise<void> {
  const next = randomFrom(`${SEED} ${kind} ${index}`)
  const random = (most: number) => Math.floor(next() * most)
  const take =
    kind === 'job'
      ? `select id, attempt, token from klieo.claim('crowd', 'w', ${LEASE_MS}, 2)`
      : `select seq as id, attempt, token from klieo.fetch('readers', 2, ${LEASE_MS}, ${MAX_ATTEMPTS})`
  let client = await session(databaseUrl())
  try {
    for (;;) {
      const { rows } = await client.query<Held>(inSchema(take))
      for (const held of rows) {
        expect(held.attempt).toBeLessThanOrEqual(MAX_ATTEMPTS)
        await handle(client, random, kind, held)
      }
      if (rows.length === 0 && kind === 'message') await client.query(inSchema(`select klieo.bury('readers')`))
      if (rows.length === 0 && (await isOver(client))) return
      if (random(12) === 0) {
        // Its process dies with a transaction open.
        await client.query('begin')
        for (const { id, token } of rows) {
          const call = kind === 'job' ? 'klieo.ack($1, $2)' : `klieo.ack_message('readers', $1, $2)`
          await client.query(inSchema(`select ${call}`), [id, token])
        }
        await client[Symbol.asyncDispose]()
        client = await session(databaseUrl())
      }
    }
  } finally {
    await client[Symbol.asyncDispose]()
  }
}

async function crowd(kind: 'job' | 'message', isOver: (client: Session) => Promise<boolean>): Promise<void> {
  await Promise.all(Array.from({ length: SESSIONS }, (_, index) => takePart(index, kind, isOver)))
}

/** How often each came out well, and how often as a dead letter; both by its id. */
async function outcomes(client: Session, kind: 'job' | 'message', header: string, subject: string): Promise<Map<string, [number, number]>> {
  const { rows } = await client.query<{ id: string; done: number; dead: number }>(
    inSchema(`
      select id::text, count(*) filter (where done)::int as done, count(*) filter (where not done)::int as dead
      from (
        select id, true as done from klieo.results where kind = $1
        union all
        select (headers->>$2)::bigint, false from klieo.message_details where subject = $3
      ) o
      group by id`),
    [kind, header, subject],
  )
  return new Map(rows.map(({ id, done, dead }) => [id, [done, dead]]))
}

test(`J3 J4 J6 each job of a crowd of foreign workers is done once, or dead with one letter (KLIEO_TEST_SEED=${SEED})`, async () => {
  await using client = await session(databaseUrl())
  const { rows } = await client.query<{ id: string }>(
    inSchema(`select klieo.enqueue('crowd', 'x', max_attempts => ${MAX_ATTEMPTS})::text as id from generate_series(1, ${WORK})`),
  )
  const count = `select count(*)::int as n from klieo.job_details where queue = 'crowd' and state <> 'dead'`
  await crowd('job', async (by) => (await by.query(inSchema(count))).rows[0].n === 0)
  const ends = await outcomes(client, 'job', 'dlq_job_id', 'crowd.dlq')
  expect(rows.filter(({ id }) => !['1,0', '0,1'].includes(String(ends.get(id))))).toEqual([])
  expect(ends.size).toBe(WORK)
}, 60_000)

test(`P3 P6 P7 each message for a crowd of foreign consumers counts once, or is a dead letter (KLIEO_TEST_SEED=${SEED})`, async () => {
  await using client = await session(databaseUrl())
  await client.query(inSchema(`select klieo.subscribe('readers', 'work')`))
  const { rows } = await client.query<{ id: string }>(
    inSchema(`select klieo.publish('work', 'x')::text as id from generate_series(1, ${WORK})`),
  )
  const count = `select pending + in_flight + redelivering as n from klieo.consumer_stats where durable = 'readers'`
  await crowd('message', async (by) => (await by.query(inSchema(count))).rows[0].n === '0')
  const ends = await outcomes(client, 'message', 'dlq_seq', 'readers.dlq')
  expect(rows.filter(({ id }) => !['1,0', '0,1'].includes(String(ends.get(id))))).toEqual([])
  expect(ends.size).toBe(WORK)
}, 60_000)

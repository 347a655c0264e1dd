import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import type { Session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { rival } from './support/rival.ts'

const connectionString = databaseUrl()
/** So many that a scan over their dead versions is slow beyond doubt. */
const DEAD = 40_000
let observer: Session
let pin: Session
let schema: string
let bus: PostgresBus

beforeAll(async () => {
  observer = await rival(connectionString)
})
afterAll(async () => {
  await observer?.[Symbol.asyncDispose]()
})
beforeEach(async () => {
  schema = freshSchema()
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
  pin = await rival(connectionString)
  await pin.query('begin isolation level repeatable read')
  await pin.query('select count(*) from pg_class')
})
afterEach(async () => {
  await pin[Symbol.asyncDispose]()
  await bus.close()
})

/** Jobs that are done, while a snapshot from before keeps their rows. */
async function deadRows(queue: string, priority = 0): Promise<void> {
  await observer.query(
    `insert into ${schema}.jobs (queue, run_at, visible_at, priority, payload)
     select $1, at, at, $2, '\\x' from generate_series(1, ${DEAD}) n, lateral (select now() - interval '1 hour' + n * interval '10 ms') as due(at)`,
    [queue, priority],
  )
  await observer.query(`delete from ${schema}.jobs where queue = $1 and priority = $2`, [queue, priority])
}

interface Heads {
  priorities: number[]
  heads: Date[]
  look_ms: number
}

async function heads(queue: string): Promise<Heads | undefined> {
  const { rows } = await observer.query(
    `select priorities::int[], heads, look_ms from ${schema}.job_heads where queue = $1 order by seq desc limit 1`,
    [queue],
  )
  return rows[0] as Heads | undefined
}

const enqueue = (queue: string, text: string, priority = 0) => bus.jobs.enqueue(queue, { payload: Buffer.from(text), priority })

async function claim(queue: string): Promise<string | null> {
  const job = await bus.jobs.claim(queue, 'w', 60_000)
  await job?.ack()
  return job ? Buffer.from(job.payload).toString() : null
}

/** How many index entries a claim reads. */
async function rowsMet(queue: string): Promise<number> {
  const before = await fetched()
  await observer.query('begin')
  await observer.query(`select from ${schema}.claim_jobs($1, 'w', 60000, 1)`, [queue])
  await observer.query('rollback')
  return (await fetched()) - before
}

/** Index entries read so far by this session's own transactions. */
async function fetched(): Promise<number> {
  await observer.query('select pg_stat_force_next_flush()')
  await observer.query('select pg_stat_clear_snapshot()')
  const { rows } = await observer.query('select idx_tup_read::int as n from pg_stat_all_indexes where indexrelid = $1::regclass', [
    `${schema}.jobs_due`,
  ])
  return (rows[0] as { n: number }).n
}

describe('heads', () => {
  test('J2 behind dead rows that a snapshot pins, claims begin where the jobs begin', async () => {
    await deadRows('q')
    for (let n = 0; n < 20; n++) await enqueue('q', `${n}`)
    expect(await claim('q')).toBe('0')
    const known = await heads('q')
    expect(known?.priorities).toContain(0)
    for (let n = 1; n < 20; n++) expect(await claim('q')).toBe(`${n}`)
    expect(await claim('q')).toBeNull()
  })

  test('J8 with a head noted, a job of a higher or lower priority takes its place as before', async () => {
    await deadRows('q')
    await enqueue('q', 'middle')
    expect(await claim('q')).toBe('middle')
    expect((await heads('q'))?.priorities).toContain(0)
    await enqueue('q', 'low', -5)
    await enqueue('q', 'middle')
    await enqueue('q', 'high', 5)
    expect([await claim('q'), await claim('q'), await claim('q')]).toEqual(['high', 'middle', 'low'])
  })

  test('J8 heads of several priorities stand side by side', async () => {
    await deadRows('q', 7)
    await deadRows('q', -7)
    await enqueue('q', 'low', -7)
    await enqueue('q', 'high', 7)
    expect(await claim('q')).toBe('high')
    expect((await heads('q'))?.priorities).toEqual(expect.arrayContaining([7, -7]))
    await enqueue('q', 'between')
    await enqueue('q', 'high', 7)
    expect([await claim('q'), await claim('q'), await claim('q')]).toEqual(['high', 'between', 'low'])
  })

  test('J1 a job whose transaction commits long after the head has passed it is found', async () => {
    await using straggler = await rival(connectionString)
    await straggler.query('begin')
    await straggler.query(`select ${schema}.enqueue('q', convert_to('straggler', 'UTF8'), run_at => now() - interval '2 hours')`)
    await deadRows('q')
    await enqueue('q', 'first')
    expect(await claim('q')).toBe('first')
    expect((await heads('q'))?.priorities).toContain(0)
    await straggler.query('commit')
    // In bounded time: twenty times what a look from the beginning takes.
    await eventually(async () => expect(await claim('q')).toBe('straggler'), { timeoutMs: 10_000 })
  })

  test('J3 a claim below the head that is rolled back leaves its job to be found', async () => {
    await deadRows('q')
    await enqueue('q', 'taken')
    await using other = await rival(connectionString)
    await other.query('begin')
    expect((await other.query(`select from ${schema}.claim_jobs('q', 'other', 60000, 1)`)).rowCount).toBe(1)
    await observer.query(
      `insert into ${schema}.job_heads (queue, priorities, heads, looked_at, look_ms) values ('q', '{0}', array[now()], now(), 10)`,
    )
    expect(await claim('q')).toBeNull()
    await other.query('rollback')
    await eventually(async () => expect(await claim('q')).toBe('taken'), { timeoutMs: 10_000 })
  })

  test('J7 a waiting claim gets a job behind dead rows at its time', async () => {
    await deadRows('q')
    await enqueue('q', 'first')
    expect(await claim('q')).toBe('first')
    await bus.jobs.enqueue('q', { payload: Buffer.from('later'), delayMs: 300 })
    const job = await bus.jobs.claim('q', 'w', 60_000, { waitMs: 10_000 })
    expect(Buffer.from(job!.payload).toString()).toBe('later')
  })

  test('J2 a head costs a claim no dead row before it', async () => {
    await deadRows('q')
    for (let n = 0; n < 5; n++) await enqueue('q', `${n}`)
    expect(await rowsMet('q')).toBeGreaterThan(DEAD)
    expect(await claim('q')).toBe('0')
    await observer.query(`update ${schema}.job_heads set look_ms = 1e6, looked_at = now()`)
    expect(await rowsMet('q')).toBeLessThan(DEAD / 10)
  })

  test('J2 without dead rows nothing is noted', async () => {
    for (let n = 0; n < 20; n++) await enqueue('idle', `${n}`)
    for (let n = 0; n < 20; n++) expect(await claim('idle')).toBe(`${n}`)
    // A machine that was busy in the wrong moment looks like dead rows, until the next look.
    await eventually(async () => {
      expect(await claim('idle')).toBeNull()
      expect((await heads('idle'))?.priorities ?? []).toEqual([])
    })
  })

  test('J8 a head does not pass jobs that another claim has only locked', async () => {
    await deadRows('q')
    await enqueue('q', 'first')
    expect(await claim('q')).toBe('first')
    for (let n = 0; n < 6; n++) await enqueue('q', `${n}`)
    await observer.query(
      `insert into ${schema}.job_heads (queue, priorities, heads, looked_at, look_ms)
       select queue, priorities, heads, now(), 1e6 from ${schema}.job_heads where queue = 'q' order by seq desc limit 1`,
    )
    await using other = await rival(connectionString)
    await other.query('begin')
    await other.query(`select from ${schema}.jobs where payload in ('0', '1', '2') for update`)
    // What moves the head: a claim that was slow.
    expect(await claim('q')).toBe('3')
    const { rows } = await observer.query(
      `select ${schema}.move_head('q', 0::smallint, heads[1], ${schema}.head_before((select min(visible_at) from ${schema}.jobs where queue = 'q'), now()))
       from ${schema}.job_heads where queue = 'q' order by seq desc limit 1`,
    )
    expect(rows.length).toBe(1)
    await other.query('rollback')
    expect([await claim('q'), await claim('q'), await claim('q'), await claim('q')]).toEqual(['0', '1', '2', '4'])
  })

  test('J8 a claim that began before a look does not raise what the look has lowered', async () => {
    await observer.query(
      `insert into ${schema}.job_heads (queue, priorities, heads, looked_at, look_ms) values ('q', '{0}', array[timestamptz '2020-01-01'], now(), 1e6)`,
    )
    await observer.query(`select ${schema}.move_head('q', 0::smallint, '2021-01-01', '2022-01-01')`)
    expect((await heads('q'))?.heads).toEqual([new Date('2020-01-01')])
    await observer.query(`select ${schema}.move_head('q', 0::smallint, '2020-01-01', '2022-01-01')`)
    expect((await heads('q'))?.heads).toEqual([new Date('2022-01-01')])
  })

  test('J8 what goes back unbegun keeps its place, and a head goes back with it', async () => {
    const ids = [await enqueue('q', '0'), await enqueue('q', '1'), await enqueue('q', '2')]
    const { rows } = await observer.query(`select id, token from ${schema}.claim_jobs('q', 'w', 60000, 2)`)
    await observer.query(
      `insert into ${schema}.job_heads (queue, priorities, heads, looked_at, look_ms) values ('q', '{0}', array[clock_timestamp()], clock_timestamp(), 1e6)`,
    )
    const claimed = rows as { id: string; token: string }[]
    await observer.query(`select ${schema}.release_jobs($1, $2, '{f,f}')`, [claimed.map(({ id }) => id), claimed.map(({ token }) => token)])
    const again = await bus.jobs.claimMany('q', 'w', 60_000, { limit: 3 })
    expect(again.map(({ id }) => id)).toEqual(ids)
    expect(again.map(({ attempt }) => attempt)).toEqual([1, 1, 1])
  })

  test('J1 a look that took long, or a clock that was set back, puts the next look off by five seconds at the most', async () => {
    const due = async (looked: string, lookMs: number) => {
      const { rows } = await observer.query(`select ${schema}.look_is_due(${looked}, $1) as due`, [lookMs])
      return (rows[0] as { due: boolean }).due
    }
    expect(await due(`now() - interval '6 s'`, 1e6)).toBe(true)
    expect(await due(`now() - interval '1 s'`, 1e6)).toBe(false)
    expect(await due(`now() + interval '1 hour'`, 1e6)).toBe(true)
    expect(await due(`now() - interval '1 s'`, 10)).toBe(true)
  })

  test('J1 a claim in a transaction that stays open does not keep others from looking', async () => {
    await deadRows('q')
    await enqueue('q', 'first')
    await using open = await rival(connectionString)
    await open.query('begin')
    await open.query(`select from ${schema}.claim_jobs('q', 'open', 60000, 1)`)
    const { rows } = await open.query(`select count(*)::int as n from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()`)
    expect(rows).toEqual([{ n: 0 }])
    await open.query('rollback')
  })
})

/** The queries of docs/when-something-is-wrong.md: each finds nothing while all is well, and then what it is for. */

import type pg from 'pg'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { type Session, session, untilBlocked } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { FreshDatabase } from './fresh-database.ts'
import { blocksOf, document } from './psql.ts'

const text = await document('when-something-is-wrong.md')
const queries = text
  .split(/^(?=## \d+\. )/m)
  .slice(1)
  .map((part) => ({ number: Number(/^## (\d+)/.exec(part)![1]), sql: blocksOf(part, 'sql')[0]!.code }))

let database: FreshDatabase
let client: Session

beforeAll(async () => {
  database = await FreshDatabase.make()
  client = await session(database.url)
})

afterAll(async () => {
  await client?.[Symbol.asyncDispose]()
  await database?.[Symbol.asyncDispose]()
})

async function rows(sql: string, values: readonly unknown[] = [], by: pg.ClientBase = client): Promise<Record<string, unknown>[]> {
  return (await by.query(sql, [...values])).rows
}

/** What the query of that number finds. `patience` stands for its minutes, which no test waits for. */
function found(number: number, patience?: string): Promise<Record<string, unknown>[]> {
  const { sql } = queries[number - 1]!
  return rows(patience === undefined ? sql : sql.replaceAll(`interval '1 minute'`, `interval '${patience}'`))
}

const enqueue = (queue: string, more = '') => rows(`select klieo.enqueue($1, 'x'${more})`, [queue])
const claim = async (queue: string, ttlMs = 60_000) => (await rows(`select id, token from klieo.claim($1, 'me', $2)`, [queue, ttlMs]))[0]!

test('there are ten, and while all is well none of them finds anything', async () => {
  expect(queries.map(({ number }) => number)).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
  await enqueue('well')
  const job = await claim('well')
  await rows('select klieo.ack($1, $2)', [job.id, job.token])
  await enqueue('well', `, run_at => now() + interval '1 hour'`)
  await rows(`select klieo.subscribe('well', 'well')`)
  await rows(`select klieo.publish('well', 'x')`)
  await rows(`select * from klieo.fetch('well')`)
  // The sessions of other tests, on the same server, are nobody's trouble here: 8 and 9 look at all of them.
  for (const number of [1, 2, 3, 4, 5, 6, 7, 10]) expect(await found(number), `query ${number}`).toEqual([])
})

test('1 work piles up: a queue whose oldest job has waited for long', async () => {
  await enqueue('piled', `, run_at => now() - interval '5 minutes'`)
  const [queue, ...others] = await found(1)
  expect(others).toEqual([])
  expect(queue).toMatchObject({ queue: 'piled', ready: '1', running: '0' })
  expect(queue!.waiting_for).toMatchObject({ minutes: 5 })
})

test('2 jobs fail again and again: their errors, counted', async () => {
  for (let n = 0; n < 3; n++) await enqueue('failing')
  for (let n = 0; n < 3; n++) {
    const job = await claim('failing')
    await rows('select klieo.nak($1, $2, 60000, $3)', [job.id, job.token, 'the printer is out of paper'])
  }
  expect(await found(2)).toMatchObject([{ queue: 'failing', error: 'the printer is out of paper', jobs: '3', attempts: 1 }])
})

test('3 jobs are dead: for what reasons; 7 and their letters have arrived', async () => {
  for (let n = 0; n < 2; n++) {
    await enqueue('dying', ', max_attempts => 1')
    const job = await claim('dying')
    await rows('select klieo.nak($1, $2, error => $3)', [job.id, job.token, 'no such customer'])
  }
  await enqueue('dying', ', max_attempts => 1')
  await claim('dying', 0)
  await rows('select * from klieo.reap_jobs(10)')
  expect(await found(3)).toMatchObject([
    { queue: 'dying', reason: 'no such customer', jobs: '2' },
    { queue: 'dying', reason: 'the lease of the last attempt ran out', jobs: '1' },
  ])
  expect(await found(7)).toMatchObject([
    { subject: 'dying.dlq', reason: 'max_attempts_exceeded', error: 'no such customer', letters: '2' },
    { subject: 'dying.dlq', reason: 'max_attempts_exceeded', error: 'the lease of the last attempt ran out', letters: '1' },
  ])
})

test('4 workers die: the jobs that they left, by who had them', async () => {
  await enqueue('orphaned')
  for (let n = 0; n < 3; n++) await claim('orphaned', 0)
  expect(await found(4)).toMatchObject([{ queue: 'orphaned', worker_id: 'me', jobs: '1', attempts: 3 }])
})

test('5 messages are not read: a durable that is behind, and one where nobody fetches', async () => {
  await rows(`select klieo.subscribe('behind', 'behind')`)
  await rows(`select klieo.publish('behind', 'x') from generate_series(1, 1001)`)
  await rows(`select klieo.subscribe('silent', 'silent')`)
  await rows(`update klieo.consumer_offsets set last_active_at = now() - interval '1 hour' where durable = 'silent'`)
  const durables = await found(5)
  expect(durables).toMatchObject([
    { durable: 'behind', pending: '1001' },
    { durable: 'silent', pending: '0' },
  ])
  expect(durables[1]!.silent_for).toMatchObject({ hours: 1 })
})

test('6 messages come back again and again: which, and how often they were handed out', async () => {
  await rows(`select klieo.subscribe('poisoned', 'poison')`)
  await rows(`select klieo.publish('poison', 'a pill')`)
  for (let n = 0; n < 4; n++) {
    const [message] = await rows(`select seq, token from klieo.fetch('poisoned')`)
    await rows(`select klieo.nak_message('poisoned', $1, $2)`, [message!.seq, message!.token])
  }
  expect(await found(6)).toMatchObject([{ durable: 'poisoned', deliveries: 4, subject: 'poison', payload: 'a pill' }])
})

test('8 an old transaction is open: whose, and for how long', async () => {
  await using forgetful = await session(database.url, { applicationName: 'forgetful' })
  await rows('begin isolation level repeatable read', [], forgetful)
  await rows('select 1', [], forgetful)
  const mine = async () => (await found(8, '50 milliseconds')).filter(({ pid }) => pid === forgetful.pid)
  const [transaction] = await eventually(async () => {
    const transactions = await mine()
    return transactions.length > 0 && transactions
  }).then((transactions) => transactions as Record<string, unknown>[])
  expect(transaction).toMatchObject({ application_name: 'forgetful', state: 'idle in transaction', query: 'select 1' })
  expect(transaction!.holds_back).toBeGreaterThanOrEqual(0)
  expect((await found(8)).filter(({ pid }) => pid === forgetful.pid)).toEqual([])
  await rows('commit', [], forgetful)
  expect(await mine()).toEqual([])
})

test('9 somebody waits for a lock: who, and behind whom', async () => {
  await using first = await session(database.url, { applicationName: 'first' })
  await using second = await session(database.url, { applicationName: 'second' })
  await rows('begin', [], first)
  await rows(`select klieo.enqueue('locked', 'x', dedup_key => 'the same')`, [], first)
  const waiting = rows(`select klieo.enqueue('locked', 'x', dedup_key => 'the same') as id`, [], second)
  await untilBlocked(client, second.pid)
  expect((await found(9)).filter((row) => row.waiting === second.pid)).toMatchObject([
    { application_name: 'second', behind: first.pid, whose: 'first', who_is: 'idle in transaction' },
  ])
  await rows('rollback', [], first)
  await waiting
  expect((await found(9)).filter((row) => row.waiting === second.pid)).toEqual([])
})

test('10 the tables grow: a table full of dead rows, which an old snapshot pins', async () => {
  await using pinning = await session(database.url)
  await rows('begin isolation level repeatable read', [], pinning)
  await rows('select 1', [], pinning)
  await rows(`insert into klieo.jobs (queue, run_at, visible_at, payload) select 'grown', now(), now(), 'x' from generate_series(1, 25000)`)
  await rows(`delete from klieo.jobs where queue = 'grown'`)
  const [table, ...others] = await eventually(
    async () => {
      const tables = await found(10)
      return tables.length > 0 && tables
    },
    { what: 'the statistics' },
  ).then((tables) => tables as Record<string, unknown>[])
  expect(others).toEqual([])
  expect(table).toMatchObject({ table: 'jobs' })
  expect(Number(table!.dead)).toBeGreaterThan(20_000)
  await rows('commit', [], pinning)
}, 60_000)

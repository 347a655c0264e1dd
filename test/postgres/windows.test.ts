/** What depends on a time that no test waits for: minutes and days are moved in the tables, by the clock of the server. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { Taker } from './support/outcome.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
const LONG_MS = 60_000

let bus: PostgresBus
let observer: Session
let names = 0

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
  observer = await session(connectionString)
})

afterAll(async () => {
  await bus.close()
  await observer.query(`drop schema ${schema} cascade`)
  await observer[Symbol.asyncDispose]()
})

const fresh = () => `n${++names}`

async function idEndsIn(msgId: string, ms: number): Promise<void> {
  await observer.query(
    `update ${schema}.message_ids set expires_at = clock_timestamp() + $2 * interval '1 millisecond' where msg_id = $1 returning msg_id`,
    [msgId, ms],
  )
}

/** As if the job had been enqueued a day ago. */
async function recordIsOver(queue: string, dedupKey: string): Promise<void> {
  const { rowCount } = await observer.query(
    `update ${schema}.kv_entries set expires_at = clock_timestamp() - interval '1 second' where bucket = $1 and key = $2`,
    [`dedup.${queue}`, dedupKey],
  )
  expect(rowCount).toBe(1)
}

async function oneRow<T>(text: string, values: unknown[]): Promise<T> {
  const { rows } = await observer.query(text, values)
  expect(rows.length).toBe(1)
  return rows[0] as T
}

describe('message ids', () => {
  test('P12 a msgId is free again once its two minutes are over, and then begins anew', async () => {
    const [subject, msgId] = [fresh(), fresh()]
    const first = await bus.pubsub.publish(subject, '1', { msgId })
    const { left } = await oneRow<{ left: string }>(
      `select extract(epoch from expires_at - clock_timestamp()) as left from ${schema}.message_ids where msg_id = $1`,
      [msgId],
    )
    expect(Number(left)).toBeLessThanOrEqual(120)
    expect(Number(left)).toBeGreaterThan(90)
    await idEndsIn(msgId, -1)
    const second = await bus.pubsub.publish(subject, '2', { msgId })
    expect(second.duplicate).toBe(false)
    expect(second.seq).toBeGreaterThan(first.seq)
    expect(await bus.pubsub.publish(subject, '3', { msgId })).toEqual({ seq: second.seq, duplicate: true })
  })

  test('P12 a duplicate does not prolong the two minutes', async () => {
    const [subject, msgId] = [fresh(), fresh()]
    const first = await bus.pubsub.publish(subject, '1', { msgId })
    await idEndsIn(msgId, 1_500)
    expect(await bus.pubsub.publish(subject, '2', { msgId })).toEqual({ seq: first.seq, duplicate: true })
    await eventually(async () => !(await bus.pubsub.publish(subject, '3', { msgId })).duplicate, {
      timeoutMs: 8_000,
      what: 'the end of the window although duplicates come all the while',
    })
  })
})

describe('idempotency records', () => {
  test('J5 the record of a job that lives longer than a day still counts', async () => {
    const [queue, dedupKey] = [fresh(), 'once']
    const id = await bus.jobs.enqueue(queue, { payload: 'x', dedupKey })
    await recordIsOver(queue, dedupKey)
    expect(await bus.jobs.enqueue(queue, { payload: 'y', dedupKey })).toBe(id)
    expect((await bus.jobs.claimMany(queue, 'w', LONG_MS, { limit: 5 })).length).toBe(1)
    expect(Buffer.from((await bus.kv.get(`dedup.${queue}`, dedupKey))!.value).toString()).toBe(id)
    // Claimed it lives, too.
    expect(await bus.jobs.enqueue(queue, { payload: 'z', dedupKey })).toBe(id)
  })

  test('J5 the record of a job that is done is over after a day, and the key is free again', async () => {
    const [queue, dedupKey] = [fresh(), 'once']
    const id = await bus.jobs.enqueue(queue, { payload: 'x', dedupKey })
    await (await bus.jobs.claim(queue, 'w', LONG_MS))!.ack()
    expect(await bus.jobs.enqueue(queue, { payload: 'y', dedupKey })).toBe(id)
    await recordIsOver(queue, dedupKey)
    expect(await bus.kv.get(`dedup.${queue}`, dedupKey)).toBe(null)
    const next = await bus.jobs.enqueue(queue, { payload: 'z', dedupKey })
    expect(next).not.toBe(id)
    expect((await bus.jobs.claim(queue, 'w', LONG_MS))?.id).toBe(next)
  })
})

describe('leases that were asked for anew', () => {
  const ends = 'extract(epoch from visible_at) as ends'

  test('J6 a heartbeat never shortens a lease', async () => {
    const queue = fresh()
    await bus.jobs.enqueue(queue, { payload: 'x' })
    const job = await bus.jobs.claim(queue, 'w', LONG_MS)
    const row = await oneRow<{ token: string; ends: string }>(`select token, ${ends} from ${schema}.jobs where id = $1`, [job!.id])
    const beat = await oneRow<{ until: string }>(
      `select extract(epoch from b.until) as until from ${schema}.heartbeat_job($1, $2, 1000) b`,
      [job!.id, row.token],
    )
    expect(beat.until).toBe(row.ends)
    expect((await oneRow<{ ends: string }>(`select ${ends} from ${schema}.jobs where id = $1`, [job!.id])).ends).toBe(row.ends)
    await job!.ack()
  })

  test('P7 an extend never shortens an ack wait', async () => {
    const subject = fresh()
    await using stream = await bus.pubsub.subscribe(subject, subject, { ackWaitMs: LONG_MS })
    const { seq } = await bus.pubsub.publish(subject, 'x')
    const message = await new Taker(stream).expect()
    const where = 'where seq = $1'
    const row = await oneRow<{ consumer_id: number; token: string; ends: string }>(
      `select consumer_id, token, ${ends} from ${schema}.deliveries ${where}`,
      [seq],
    )
    const extended = await oneRow<{ extended: boolean }>(
      `select extended from ${schema}.extend_deliveries(array[$1::int], array[$2::bigint], array[$3::uuid], array[1000::bigint])`,
      [row.consumer_id, seq, row.token],
    )
    expect(extended.extended).toBe(true)
    expect((await oneRow<{ ends: string }>(`select ${ends} from ${schema}.deliveries ${where}`, [seq])).ends).toBe(row.ends)
    await message.ack()
  })
})

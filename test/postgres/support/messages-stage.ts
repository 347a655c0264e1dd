/** A bus, another, a session that looks and one with transactions of its own: the stage on which settlements of messages are tried. */

import { afterAll, beforeAll, expect } from 'vitest'
import { type MsgStream, PostgresBus, type PostgresTx, type SubscribeOptions } from '../../../src/index.ts'
import { databaseUrl, freshSchema } from '../../support/server.ts'
import { type Session, session } from '../../support/sessions.ts'
import { eventually } from '../../support/wait.ts'
import { Taker } from './outcome.ts'

export const schema = freshSchema()
export const connectionString = databaseUrl()
export const SHORT_MS = 500
export const LONG_MS = 60_000
/** Time in which a message that must not come would have come: more than a poll interval, also with jitter. */
export const QUIET_MS = 400

export let bus: PostgresBus
export let other: PostgresBus
export let observer: Session
export let caller: Session

/** To be called once by a test file. */
export function setTheStage(): void {
  beforeAll(async () => {
    const options = { connectionString, schema, maintenance: false, pollIntervalMs: 100 }
    bus = await PostgresBus.connect(options)
    other = await PostgresBus.connect(options)
    observer = await session(connectionString)
    caller = await session(connectionString)
    await observer.query(`create table ${schema}.results (seq bigint not null)`)
  })

  afterAll(async () => {
    await Promise.all([bus.close(), other.close()])
    await observer.query(`drop schema ${schema} cascade`)
    await Promise.all([observer[Symbol.asyncDispose](), caller[Symbol.asyncDispose]()])
  })
}

let durables = 0
/** A name that nobody has used. */
export function freshDurable(): string {
  return `d${++durables}`
}

/** A durable of its own, with one message handed out to `bus`; `rival()` adds a member on the other bus. */
export async function held(options: SubscribeOptions = {}) {
  const durable = freshDurable()
  const stream = await bus.pubsub.subscribe(durable, durable, { ackWaitMs: LONG_MS, ...options })
  const { seq } = await bus.pubsub.publish(durable, 'p', { headers: { h: 'v' } })
  const message = await new Taker(stream).expect()
  expect(message.seq).toBe(seq)
  let rivalStream: MsgStream<PostgresTx> | undefined
  return {
    durable,
    stream,
    message,
    rival: async (ackWaitMs = LONG_MS) => {
      rivalStream = await other.pubsub.subscribe(durable, durable, { ...options, ackWaitMs })
      return new Taker(rivalStream)
    },
    [Symbol.asyncDispose]: async () => {
      await Promise.all([stream.close(), rivalStream?.close()])
    },
  }
}

export async function rows(durable: string): Promise<Record<string, unknown>[]> {
  const answer = await observer.query(
    `select d.* from ${schema}.deliveries d join ${schema}.consumer_offsets o on o.id = d.consumer_id where o.durable = $1 order by d.seq`,
    [durable],
  )
  return answer.rows as Record<string, unknown>[]
}

export async function untilExpired(durable: string): Promise<void> {
  await eventually(
    async () => {
      const answer = await observer.query(
        `select bool_and(d.visible_at <= clock_timestamp()) as over
         from ${schema}.deliveries d join ${schema}.consumer_offsets o on o.id = d.consumer_id where o.durable = $1`,
        [durable],
      )
      return (answer.rows[0] as { over: boolean }).over
    },
    { what: 'the end of the ack wait' },
  )
}

export async function consumerId(durable: string): Promise<number> {
  const answer = await observer.query(`select id from ${schema}.consumer_offsets where durable = $1`, [durable])
  return (answer.rows[0] as { id: number }).id
}

export async function deadLetters(durable: string): Promise<{ headers: Record<string, string>; payload: Uint8Array }[]> {
  const answer = await observer.query(`select headers, payload from ${schema}.messages where subject = $1 order by seq`, [`${durable}.dlq`])
  return answer.rows as { headers: Record<string, string>; payload: Uint8Array }[]
}

export async function results(seq: number): Promise<number> {
  const answer = await observer.query(`select count(*)::int as n from ${schema}.results where seq = $1`, [seq])
  return (answer.rows[0] as { n: number }).n
}

export async function untilWaitedFor(holder: Session): Promise<void> {
  await eventually(
    async () => (await observer.query('select from pg_stat_activity where $1 = any(pg_blocking_pids(pid))', [holder.pid])).rowCount === 1,
    { what: 'somebody waiting for the lock' },
  )
}

export async function untilAckWaits(holder: Session): Promise<void> {
  await eventually(
    async () => {
      const { rowCount } = await observer.query(
        `select from pg_stat_activity where $1 = any(pg_blocking_pids(pid)) and query like '%ack_deliveries%'`,
        [holder.pid],
      )
      return rowCount === 1
    },
    { what: 'the ack waiting for the lock' },
  )
}

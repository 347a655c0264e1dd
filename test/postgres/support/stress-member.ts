/**
 * A member of two durables, to be killed at any moment. It acks what comes on `exactly` in the transaction that writes the
 * effect, a batch at a time, and what comes on `plainly` for itself, and then notes that the ack succeeded.
 */

import pg from 'pg'
import { isBusError, type MsgStream, PostgresBus, type PostgresTx } from '../../../src/index.ts'
import { type PgMsg, text } from './reading.ts'

const [connectionString, subject, ackWaitMs] = process.argv.slice(2) as [string, string, string]
const BATCH = 25
/** One transaction in so many is rolled back: its acks then never happened. */
const ROLLED_BACK = 20

const bus = await PostgresBus.connect({ connectionString, pollIntervalMs: 100, maintenance: false })
const options = { ackWaitMs: Number(ackWaitMs), maxInFlight: 100 }
const [exactly, plainly] = await Promise.all([
  bus.pubsub.subscribe(subject, 'exactly', options),
  bus.pubsub.subscribe(subject, 'plainly', options),
])
const db = new pg.Pool({ connectionString, max: 2 })
process.stdout.write('{"ready":true}\n')
await Promise.all([actExactly(exactly), actPlainly(plainly)])

async function actExactly(stream: MsgStream<PostgresTx>): Promise<void> {
  for await (const batch of batches(stream)) {
    const client = await db.connect()
    await client.query('begin')
    const acked: string[] = []
    await Promise.all(
      batch.map(async (message) => {
        if (await succeeds(message.ack({ tx: client }))) acked.push(text(message))
      }),
    )
    await client.query('insert into effects (message) select unnest($1::text[])', [acked])
    await client.query(Math.random() * ROLLED_BACK < 1 ? 'rollback' : 'commit')
    client.release()
  }
}

async function actPlainly(stream: MsgStream<PostgresTx>): Promise<void> {
  for await (const batch of batches(stream)) {
    const acked: string[] = []
    await Promise.all(
      batch.map(async (message) => {
        if (await succeeds(message.ack())) acked.push(text(message))
      }),
    )
    await db.query('insert into plain_acks (message) select unnest($1::text[])', [acked])
  }
}

/** @returns false when the message was no longer this member's */
async function succeeds(ack: Promise<void>): Promise<boolean> {
  try {
    await ack
    return true
  } catch (error) {
    if (isBusError(error, 'lease_lost')) return false
    throw error
  }
}

/** What is there already goes together. */
async function* batches(stream: MsgStream<PostgresTx>): AsyncGenerator<PgMsg[]> {
  const iterator = stream[Symbol.asyncIterator]()
  let batch: PgMsg[] = []
  for (;;) {
    let arrived = false
    const next = iterator.next().then((result) => {
      arrived = true
      return result
    })
    await new Promise((resolve) => setImmediate(resolve))
    if (batch.length > 0 && (!arrived || batch.length >= BATCH)) {
      yield batch
      batch = []
    }
    const result = await next
    if (result.done) return
    batch.push(result.value)
  }
}

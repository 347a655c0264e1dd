/** Two durables read the same results, each at its own pace, and each adds every result exactly once. */

import { decode, type MsgStream, type PostgresBus, type PostgresTx } from 'klieo-bus'
import type pg from 'pg'
import { inTransaction, type Schemas } from './database.ts'
import { RESULTS, type Result } from './topics.ts'

/** Redelivered after this when it was not acked, as after a crash of this process. */
const ACK_WAIT_MS = 5_000
/** Taken from the server ahead of time: little, so that what waits here does not run out of its time. */
const MAX_IN_FLIGHT = 32

interface Aggregate {
  readonly durable: string
  readonly subject: string
  add(tx: pg.PoolClient, schemas: Schemas, result: Result): Promise<unknown>
}

const LICENCES: Aggregate = {
  durable: 'licences',
  subject: RESULTS.installed,
  add: (tx, { inventory }, { licence }) =>
    tx.query(
      `insert into ${inventory}.licences as l (licence, packages) values ($1, 1)
       on conflict (licence) do update set packages = l.packages + 1`,
      [licence],
    ),
}

const SIZES: Aggregate = {
  durable: 'sizes',
  subject: RESULTS.all,
  add: (tx, { inventory }, { installed, bytes }) =>
    tx.query(
      `insert into ${inventory}.sizes as s (size, packages, bytes) values ($1, 1, $2)
       on conflict (size) do update set packages = s.packages + 1, bytes = s.bytes + excluded.bytes`,
      [installed ? sizeOf(bytes) : 'not installed', bytes],
    ),
}

function sizeOf(bytes: number): string {
  if (bytes < 100_000) return 'up to 0.1 MB'
  if (bytes < 1_000_000) return 'up to 1 MB'
  return bytes < 10_000_000 ? 'up to 10 MB' : 'larger'
}

/**
 * Runs until the bus closes.
 * @param onResult told of each result once it is added to the sizes
 */
export async function startAggregates(
  bus: PostgresBus,
  pool: pg.Pool,
  schemas: Schemas,
  onResult: (result: Result) => void,
): Promise<void> {
  for (const aggregate of [LICENCES, SIZES]) {
    const stream = await bus.pubsub.subscribe(aggregate.subject, aggregate.durable, { ackWaitMs: ACK_WAIT_MS, maxInFlight: MAX_IN_FLIGHT })
    void addUp(stream, pool, schemas, aggregate, aggregate === SIZES ? onResult : () => {})
  }
}

async function addUp(
  stream: MsgStream<PostgresTx>,
  pool: pg.Pool,
  schemas: Schemas,
  aggregate: Aggregate,
  onResult: (result: Result) => void,
): Promise<void> {
  for await (const message of stream) {
    try {
      const result = decode<Result>(message.payload)
      // The sum and the ack are one transaction: a message that is delivered again has not been added before.
      await inTransaction(pool, async (tx) => {
        await aggregate.add(tx, schemas, result)
        await message.ack({ tx })
      })
      onResult(result)
    } catch {
      // It comes again; the report shows it should it never be added.
      await message.nak(200).catch(() => {})
    }
  }
}

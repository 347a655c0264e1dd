/** Two durables read the same results, each at its own pace, and each adds every result exactly once. */

import { decode, type Msg, type MsgStream, PostgresBus, type SubscribeOptions } from 'klieo-bus'
import type pg from 'pg'
import type { AppBus } from './backend.ts'
import { inTransaction, type Schemas } from './database.ts'
import { RESULTS, type Result } from './topics.ts'

const OPTIONS: SubscribeOptions = {
  /** Redelivered after this when it was not acked, as after a crash of this process. */
  ackWaitMs: 5_000,
  /** Taken from the server ahead of time: little, so that what waits here does not run out of its time. */
  maxInFlight: 32,
}

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

/** Runs until the bus closes. */
export async function startAggregates(bus: AppBus, pool: pg.Pool, schemas: Schemas): Promise<void> {
  for (const aggregate of [LICENCES, SIZES]) {
    const { subject, durable } = aggregate
    if (bus instanceof PostgresBus) {
      // The sum and the ack are one transaction: a message that is delivered again has not been added before.
      void forEach(await bus.pubsub.subscribe(subject, durable, OPTIONS), (message, result) =>
        inTransaction(pool, async (tx) => {
          await aggregate.add(tx, schemas, result)
          await message.ack({ tx })
        }),
      )
    } else {
      // The sum and a row that says what it holds are one transaction, and the ack comes after it: what is delivered again is known.
      void forEach(await bus.pubsub.subscribe(subject, durable, OPTIONS), async (message, result) => {
        await inTransaction(pool, async (tx) => {
          if (await isFirst(tx, schemas, durable, result)) await aggregate.add(tx, schemas, result)
        })
        await message.ack()
      })
    }
  }
}

async function isFirst(tx: pg.PoolClient, { inventory }: Schemas, durable: string, { path }: Result): Promise<boolean> {
  const { rows } = await tx.query<{ tries: number }>(
    `insert into ${inventory}.added as a (durable, path) values ($1, $2)
     on conflict (durable, path) do update set tries = a.tries + 1
     returning tries`,
    [durable, path],
  )
  return rows[0]!.tries === 1
}

async function forEach<Tx>(stream: MsgStream<Tx>, add: (message: Msg<Tx>, result: Result) => Promise<void>): Promise<void> {
  for await (const message of stream) {
    try {
      await add(message, decode<Result>(message.payload))
    } catch {
      // It comes again; the report shows it should it never be added.
      await message.nak(200).catch(() => {})
    }
  }
}

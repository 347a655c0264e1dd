// What a user of the installed package writes; compiled and run there by packed.test.ts.

import { type Bus, type BusError, decode, defineQueue, encode, PostgresBus, Worker } from 'klieo-bus'
import { MemoryBus } from 'klieo-bus/memory'
import { conformance, startEmbeddedPostgres } from 'klieo-bus/testing'
import pg from 'pg'

const connectionString = process.env.DATABASE_URL as string
const schema = process.env.SCHEMA as string

async function work(bus: Bus<never>): Promise<string> {
  const done = Promise.withResolvers<string>()
  await using _worker = new Worker(bus.jobs, 'greet', async (job) => done.resolve(decode<{ name: string }>(job.payload).name))
  await bus.jobs.enqueue('greet', { payload: encode({ name: bus.supports.backend }) })
  return await done.promise
}

const memory = MemoryBus.create()
const postgres = await PostgresBus.connect({ connectionString, schema })
const client = new pg.Client({ connectionString })
await client.connect()
await client.query('begin')
const { seq } = await postgres.pubsub.publish('orders.created', 'in the transaction', { tx: client })
await client.query('rollback')
// @ts-expect-error a bus without transactions rejects tx when it is compiled
const refused = await memory.jobs.enqueue('q', { payload: '' }, { tx: client }).catch((error: BusError) => error.code)
const numbers = defineQueue<{ n: number }>('numbers')
// @ts-expect-error a string is no number
await numbers.enqueue(memory, { n: '1' }, { priority: -1 })
await numbers.enqueue(memory, { n: 1 })
const typed: number | undefined = (await numbers.claim(memory, 'w', 1_000))?.data.n
process.stdout.write(
  `${JSON.stringify({ worked: [await work(memory), await work(postgres as unknown as Bus<never>)], seq, refused, typed, testing: [typeof conformance, typeof startEmbeddedPostgres] })}\n`,
)
await client.end()
await postgres.close()
await memory.close()

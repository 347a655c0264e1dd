/** What a bus keeps of the jobs and messages that went through it. */

import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { afterAll, beforeAll, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { Taker } from './support/outcome.ts'

setFlagsFromString('--expose-gc')
const collectGarbage = runInNewContext('gc') as () => void

const schema = freshSchema()
const connectionString = databaseUrl()
const TTL_MS = 300

let bus: PostgresBus
let caller: Session

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
  caller = await session(connectionString)
})

afterAll(async () => {
  await bus.close()
  await caller.query(`drop schema ${schema} cascade`)
  await caller[Symbol.asyncDispose]()
})

type How = 'plain' | 'in a transaction' | 'never'

/** The payload, weakly held; in a function of its own, so that no frame of the test holds it too. */
async function job(how: How): Promise<WeakRef<object>> {
  await bus.jobs.enqueue('q', { payload: 'p' })
  const claimed = await bus.jobs.claim('q', 'w', TTL_MS)
  if (how === 'plain') await claimed!.ack()
  if (how === 'in a transaction') {
    await caller.query('begin')
    await claimed!.ack({ tx: caller })
    await caller.query('commit')
  }
  if (how === 'never') await caller.query(`delete from ${schema}.jobs`)
  return new WeakRef(claimed!.payload)
}

async function message(how: How): Promise<WeakRef<object>> {
  const durable = `d${crypto.randomUUID()}`
  await using stream = await bus.pubsub.subscribe(durable, durable, { ackWaitMs: TTL_MS })
  await bus.pubsub.publish(durable, 'p')
  const taken = await new Taker(stream).expect()
  if (how === 'plain') await taken.ack()
  if (how === 'in a transaction') {
    await caller.query('begin')
    await taken.ack({ tx: caller })
    await caller.query('commit')
  }
  return new WeakRef(taken.payload)
}

/** One may be left: engine and driver keep the first object, or the last, that went through a place. What grows is a leak. */
async function untilCollected(held: readonly WeakRef<object>[]): Promise<void> {
  await eventually(
    () => {
      collectGarbage()
      return held.filter((one) => one.deref() !== undefined).length <= 1
    },
    { timeoutMs: 3_000, everyMs: 50, what: 'all but one being let go' },
  )
}

async function five(one: () => Promise<WeakRef<object>>): Promise<WeakRef<object>[]> {
  const held: WeakRef<object>[] = []
  while (held.length < 5) held.push(await one())
  return held
}

for (const how of ['plain', 'in a transaction', 'never'] as const) {
  test(`J6 jobs whose ack was ${how} are not kept by the bus after their leases`, async () => {
    await untilCollected(await five(() => job(how)))
  })

  test(`P7 messages whose ack was ${how} are not kept by the bus after their ack waits`, async () => {
    await untilCollected(await five(() => message(how)))
  })
}

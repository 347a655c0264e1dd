/**
 * What every client must do, as steps: a line `{ "step": "commit" }` on standard input is answered by one with what was found.
 * Arguments: the module of the client, and the name of its `connect`.
 */

import { createInterface } from 'node:readline'
import { inspect } from 'node:util'
import { type ClaimedJob, isBusError, type Msg, PostgresBus, type PostgresTx } from 'klieo-bus'
import pg from 'pg'
import type { Client, Connect, OpenTransaction } from './client.ts'

const url = process.env.DATABASE_URL as string
/** A name that must be quoted. */
const SCHEMA = 'App-Bus'
/** What a client might take for a parameter of its own, or alter on its way. */
const BYTES = new Uint8Array([...Array(256).keys(), ...Buffer.from(`? ?? $1 :name {} [1] \\x00 'a' "b" ü`)])
const TEXT = `? ?? $1 $10 :name ::text \\ \\? \\x41 {a,"b"} 'c' "d" %s ü €`

const pool = new pg.Pool({ connectionString: url, max: 4 })
pool.on('error', () => {})
const bus = await PostgresBus.connect({ pool, schema: SCHEMA, maxPayloadBytes: 2 * 1024 * 1024 })
/** Only a notification wakes it: it polls too seldom. */
const sleeper = await PostgresBus.connect({ connectionString: url, schema: SCHEMA, pollIntervalMs: 60_000, maintenance: false })
await pool.query('create table if not exists rows (id int primary key)')

const [module = '', exported = 'connect'] = process.argv.slice(2)
const client: Client = await ((await import(`./${module}.ts`)) as Record<string, Connect>)[exported]!(url)

/** A message and a job in this process's hands, and the keys that are there before. */
interface Stage {
  readonly n: number
  readonly msg: Msg<PostgresTx>
  readonly job: ClaimedJob<PostgresTx>
  readonly revision: number
}

let last = 0

async function setTheStage(): Promise<Stage> {
  const n = ++last
  const revision = await bus.kv.put('bucket', `cas-${n}`, 'before')
  await bus.kv.put('bucket', `gone-${n}`, 'before')
  await bus.pubsub.publish(`held.${n}`, 'held')
  await bus.jobs.enqueue(`held-${n}`, { payload: 'held' })
  const stream = await bus.pubsub.subscribe(`held.${n}`, `held-${n}`)
  const [msg] = await take(stream, 1)
  const job = await bus.jobs.claim(`held-${n}`, 'worker', 60_000)
  return { n, msg: msg!, job: job!, revision }
}

async function take(stream: AsyncIterable<Msg<PostgresTx>>, count: number): Promise<Msg<PostgresTx>[]> {
  const taken: Msg<PostgresTx>[] = []
  for await (const msg of stream) if (taken.push(msg) === count) break
  return taken
}

/** The row, and everything of the bus that takes `tx`. */
async function everything({ tx, insert }: OpenTransaction, { n, msg, job, revision }: Stage): Promise<void> {
  await bus.pubsub.publish(`made.${n}`, BYTES, { tx, headers: { text: TEXT }, msgId: `${TEXT} ${n}` })
  await bus.jobs.enqueue(`made-${n}`, { payload: BYTES, headers: { text: TEXT }, dedupKey: TEXT }, { tx })
  await insert(n)
  await bus.pubsub.publishMany(
    [
      { subject: `made.${n}`, payload: '' },
      { subject: `made.${n}`, payload: BYTES },
    ],
    { tx },
  )
  await bus.jobs.enqueueMany(
    `made-${n}`,
    [
      { payload: '', runAt: new Date(Date.now() + 3_600_000) },
      { payload: 'b', delayMs: 3_600_000, priority: -3, maxAttempts: 2 },
    ],
    { tx },
  )
  const put = await bus.kv.put('bucket', `put-${n}`, BYTES, { tx })
  await bus.kv.cas('bucket', `put-${n}`, BYTES, put, { tx, ttlMs: 3_600_000 })
  await bus.kv.cas('bucket', `cas-${n}`, BYTES, revision, { tx })
  await bus.kv.delete('bucket', `gone-${n}`, { tx })
  await msg.ack({ tx })
  await job.ack({ tx })
}

/** As anybody else sees it. Of payloads how many are as they were sent. */
async function seen({ n }: Stage): Promise<Record<string, unknown>> {
  const { rows } = await pool.query(
    `select
       (select count(*)::int from rows where id = $1) as row,
       (select count(*)::int from "App-Bus".message_details where subject = 'made.' || $1) as messages,
       (select count(*)::int from "App-Bus".message_details where subject = 'made.' || $1 and payload = $2) as intact_messages,
       (select count(*)::int from "App-Bus".message_details where subject = 'made.' || $1 and headers::jsonb ->> 'text' = $3) as intact_headers,
       (select count(*)::int from "App-Bus".job_details where queue = 'made-' || $1) as jobs,
       (select count(*)::int from "App-Bus".job_details where queue = 'made-' || $1 and payload = $2 and dedup_key = $3) as intact_jobs,
       (select in_flight::int from "App-Bus".consumer_stats where durable = 'held-' || $1) as held_messages,
       (select count(*)::int from "App-Bus".job_details where queue = 'held-' || $1) as held_jobs`,
    [n, BYTES, TEXT],
  )
  const value = async (key: string) => {
    const entry = await bus.kv.get('bucket', `${key}-${n}`)
    return entry && (Buffer.compare(entry.value, BYTES) === 0 ? 'intact' : Buffer.from(entry.value).toString())
  }
  return { ...rows[0], put: await value('put'), cas: await value('cas'), gone: await value('gone') }
}

async function codeOf(work: () => unknown): Promise<unknown> {
  try {
    await work()
    return 'ok'
  } catch (error) {
    return isBusError(error) ? error.code : `${(error as Error).name}: ${(error as Error).message}`
  }
}

/** The SQLSTATE, however deep the client keeps it. */
function stateOf(error: unknown): unknown {
  for (let at = error; typeof at === 'object' && at !== null; ) {
    const { code, originalCode, cause, driverError, meta } = at as Record<string, unknown>
    const state = originalCode ?? code
    if (typeof state === 'string' && /^\d[0-9A-Z]{4}$/.test(state)) return state
    at = cause ?? driverError ?? (meta as Record<string, unknown> | undefined)?.driverAdapterError
    if (at === undefined && code === 'P2002') return '23505'
  }
  return 'none'
}

const rejected = (work: Promise<unknown>): Promise<unknown> =>
  work.then(
    () => 'nothing',
    (error: unknown) => error,
  )

/** The one session of this database that waits for a lock. */
async function terminateWhoeverWaits(): Promise<void> {
  for (;;) {
    const { rowCount } = await pool.query(
      `select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`,
    )
    if (rowCount) return
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

const steps: Readonly<Record<string, () => Promise<Record<string, unknown>>>> = {
  async commit() {
    const stage = await setTheStage()
    let open: Record<string, unknown> | undefined
    await client.transaction(async (transaction) => {
      await everything(transaction, stage)
      open = await seen(stage)
    })
    return { open, after: await seen(stage) }
  },

  async rollback() {
    const stage = await setTheStage()
    const failed = await rejected(
      client.transaction(async (transaction) => {
        await everything(transaction, stage)
        throw new Error('no')
      }),
    )
    const after = await seen(stage)
    // The holders still have what they held.
    await client.transaction(async ({ tx }) => {
      await stage.msg.ack({ tx })
      await stage.job.ack({ tx })
    })
    return { failed: (failed as Error).message, after, later: await seen(stage) }
  },

  async 'unique violation'() {
    const stage = await setTheStage()
    await pool.query('insert into rows values ($1)', [-stage.n])
    let next: unknown
    const failed = await rejected(
      client.transaction(async (transaction) => {
        await everything(transaction, stage)
        try {
          await transaction.insert(-stage.n)
        } finally {
          next = await codeOf(() => bus.jobs.enqueue('never', { payload: 'x' }, { tx: transaction.tx }))
        }
      }),
    )
    return { state: stateOf(failed), next, after: await seen(stage) }
  },

  async refused() {
    const stage = await setTheStage()
    const queue = `lost-${stage.n}`
    await bus.jobs.enqueue(queue, { payload: 'x' })
    const lost = await bus.jobs.claim(queue, 'first', 1)
    const holder = await bus.jobs.claim(queue, 'second', 60_000, { waitMs: 5_000 })
    const codes: unknown[] = []
    await client.transaction(async (transaction) => {
      const { tx } = transaction
      codes.push(await codeOf(() => lost!.ack({ tx })))
      codes.push(await codeOf(() => bus.kv.cas('bucket', `put-${stage.n}`, 'x', 77, { tx })))
      codes.push(await codeOf(() => bus.kv.cas('bucket', `cas-${stage.n}`, 'x', null, { tx })))
      await everything(transaction, stage)
      codes.push(await codeOf(() => stage.job.ack({ tx })))
    })
    return { codes, holder: await codeOf(() => holder!.ack()), after: await seen(stage) }
  },

  async nested() {
    if (!client.nested) return { nested: false }
    const stage = await setTheStage()
    await client.transaction(async (outer) => {
      await bus.jobs.enqueue(`outer-${stage.n}`, { payload: 'x' }, { tx: outer.tx })
      await rejected(
        client.nested!(outer, async (inner) => {
          await everything(inner, stage)
          throw new Error('no')
        }),
      )
    })
    return { after: await seen(stage), outer: (await bus.jobs.claim(`outer-${stage.n}`, 'w', 1_000)) !== null }
  },

  async 'wake up'() {
    const { n } = await setTheStage()
    const stream = await sleeper.pubsub.subscribe(`woken.${n}`, `woken-${n}`)
    const watch = await sleeper.kv.watch('bucket', `woken-${n}`, { updatesOnly: true })
    const changes = watch[Symbol.asyncIterator]()
    const claimed = sleeper.jobs.claim(`woken-${n}`, 'w', 60_000, { waitMs: 30_000 })
    const message = take(stream, 1)
    const change = changes.next()
    await client.transaction(async ({ tx }) => {
      await bus.jobs.enqueue(`woken-${n}`, { payload: 'x' }, { tx })
      await bus.pubsub.publish(`woken.${n}`, 'x', { tx })
      await bus.kv.put('bucket', `woken-${n}`, 'x', { tx })
    })
    const committed = performance.now()
    await Promise.all([claimed, message, change])
    const tookMs = performance.now() - committed
    await watch.close()
    await stream.close()
    return { job: (await claimed) !== null, tookMs }
  },

  async errors() {
    const found: Record<string, unknown> = {}
    const within = async (name: string, work: (open: OpenTransaction) => Promise<unknown>) => {
      await rejected(
        client.transaction(async (open) => {
          const error = await rejected(work(open))
          found[name] = isBusError(error) ? [error.code, stateOf(error.cause)] : String(error)
          throw new Error('roll back')
        }),
      )
    }
    await within('too large', ({ tx }) => bus.jobs.enqueue('q', { payload: new Uint8Array(3 * 1024 * 1024) }, { tx }))
    await pool.query(`alter table "App-Bus".jobs add constraint test_payload_size check (queue <> 'refused')`)
    await within('too large for the table', ({ tx }) => bus.jobs.enqueue('refused', { payload: 'secret' }, { tx }))
    await pool.query(`alter table "App-Bus".jobs drop constraint test_payload_size, add constraint test_rule check (queue <> 'refused')`)
    let told = ''
    await within('refused by a rule', async ({ tx }) => {
      const error = await rejected(bus.jobs.enqueue('refused', { payload: 'secret', dedupKey: 'secret' }, { tx }))
      const { message, cause } = error as Error & { cause: Error }
      told = [message, cause.message, inspect(cause, { depth: 9 })].join()
      throw error
    })
    await pool.query('alter table "App-Bus".jobs drop constraint test_rule')
    const hidden = ['secret', Buffer.from('secret').toString('hex'), '::text::int[]']
    found.leaks = hidden.some((text) => told.includes(text))
    await pool.query('alter function "App-Bus".publish_many rename to elsewhere')
    await within('outdated', ({ tx }) => bus.pubsub.publish('a', 'b', { tx }))
    await pool.query('alter function "App-Bus".elsewhere rename to publish_many')
    return found
  },

  async 'connection lost while idle'() {
    const stage = await setTheStage()
    let code: unknown
    let another: Promise<unknown> | undefined
    await rejected(
      client.transaction(async (transaction) => {
        await everything(transaction, stage)
        const begun = Promise.withResolvers<void>()
        const end = Promise.withResolvers<void>()
        // Where the client has one connection, this one waits for it.
        another = rejected(
          client.transaction(async ({ insert }) => {
            begun.resolve()
            await end.promise
            await insert(1_000_000 + stage.n)
          }),
        )
        await pool.query(
          `select pg_terminate_backend(pid, 5000) from pg_stat_activity
           where datname = current_database() and state = 'idle in transaction' and backend_xid is not null`,
        )
        await begun.promise
        code = await codeOf(() => bus.jobs.enqueue(`idle-${stage.n}`, { payload: 'x' }, { tx: transaction.tx }))
        end.resolve()
        throw new Error('no')
      }),
    )
    await another
    const { rowCount } = await pool.query('select from "App-Bus".job_details where queue = $1', [`idle-${stage.n}`])
    return { code, enqueued: rowCount, after: await seen(stage) }
  },

  async 'connection lost'() {
    const stage = await setTheStage()
    const other = await pool.connect()
    const code = Promise.withResolvers<unknown>()
    try {
      await other.query('begin')
      await bus.kv.put('bucket', `locked-${stage.n}`, 'x', { tx: other })
      await rejected(
        client.transaction(async (transaction) => {
          await everything(transaction, stage)
          code.resolve(codeOf(() => bus.kv.put('bucket', `locked-${stage.n}`, 'y', { tx: transaction.tx })))
          await terminateWhoeverWaits()
          await code.promise
          throw new Error('no')
        }),
      )
    } finally {
      await other.query('rollback')
      other.release()
    }
    return { code: await code.promise, after: await seen(stage) }
  },

  async mistaken() {
    const found: Record<string, unknown> = {}
    for (const [name, tx] of Object.entries(client.mistaken)) {
      found[name] = await codeOf(() => bus.jobs.enqueue('mistaken', { payload: 'x' }, { tx: tx() }))
    }
    let over: PostgresTx | undefined
    await client.transaction(async ({ tx }) => {
      over = tx
    })
    if (client.knowsOver) found.over = await codeOf(() => bus.jobs.enqueue('mistaken', { payload: 'x' }, { tx: over! }))
    return { found, enqueued: (await pool.query(`select from "App-Bus".jobs where queue = 'mistaken'`)).rowCount }
  },

  async volume() {
    const { n } = await setTheStage()
    const large = new Uint8Array(1024 * 1024).map((_, i) => (i * 31) % 251)
    await client.transaction(async ({ tx }) => {
      await bus.jobs.enqueueMany(
        `many-${n}`,
        Array.from({ length: 2_000 }, (_, i) => ({ payload: `job ${i}` })),
        { tx },
      )
      await bus.kv.put('bucket', `large-${n}`, large, { tx })
    })
    const value = (await bus.kv.get('bucket', `large-${n}`))?.value
    const { rows } = await pool.query('select count(distinct payload_text)::int as jobs from "App-Bus".job_details where queue = $1', [
      `many-${n}`,
    ])
    return { jobs: rows[0].jobs, large: value !== undefined && Buffer.compare(value, large) === 0 }
  },
}

// postgres.js 3.4 writes to the connection that it lost inside a transaction, and throws where nobody can catch it.
process.on('uncaughtException', (error) => {
  if (/reading 'write'/.test(error.message) && error.stack?.includes('/postgres/src/connection.js')) return
  console.error(error)
  process.exit(1)
})

console.log(JSON.stringify({ ready: module }))
for await (const line of createInterface({ input: process.stdin })) {
  const { step } = JSON.parse(line) as { step: string }
  const facts = await steps[step]!().catch((error: unknown) => ({
    threw: String((error as Error).stack),
    code: (error as { code?: unknown }).code,
  }))
  console.log(JSON.stringify({ step, ...facts }))
}
await sleeper.close()
await bus.close()
await pool.end()
// Some clients keep a connection for ever that they lost inside a transaction.
process.exit()

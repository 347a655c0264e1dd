/**
 * What the server and the driver can do with the fewest statements that do the work: no headers, priorities, attempts, leases
 * that expire or fencing. The limit that the bus is measured against, not a thing to use.
 */

import { createRequire } from 'node:module'
import pg from 'pg'
import type { Contender, JobsSession, RequestSession } from '../contenders.ts'

const CONNECTIONS = 10
/** As many as klieo-bus has under way at once in a drain: a claim, and a batch of acks. */
const DRAIN_CONNECTIONS = 2
const BATCH = 100

const INSERT = { name: 'bare_insert', text: 'insert into bare_jobs (payload) values ($1) returning id' }
const INSERT_MANY = { name: 'bare_insert_many', text: 'insert into bare_jobs (payload) select unnest($1::bytea[]) returning id' }
const CLAIM = {
  name: 'bare_claim',
  text: `
    with due as materialized (
      select id from bare_jobs where visible_at <= statement_timestamp() order by visible_at, id limit $1 for update skip locked
    )
    update bare_jobs j set visible_at = statement_timestamp() + interval '30 s' from due where j.id = due.id returning j.id, j.payload`,
}
const DELETE = { name: 'bare_delete', text: 'delete from bare_jobs where id = any($1::bigint[])' }

async function version(): Promise<string> {
  return (createRequire(import.meta.url)('pg/package.json') as { version: string }).version
}

export class BareJobs implements JobsSession {
  readonly #clients: pg.Client[]
  readonly #free: pg.Client[]
  readonly #waiting: ((client: pg.Client) => void)[] = []

  private constructor(clients: pg.Client[]) {
    this.#clients = clients
    this.#free = [...clients]
  }

  static async open(connectionString: string): Promise<BareJobs> {
    const clients = Array.from({ length: CONNECTIONS }, () => new pg.Client({ connectionString }))
    await Promise.all(clients.map((client) => client.connect()))
    await clients[0]!.query(`
      create table bare_jobs (
        id bigint generated always as identity primary key,
        visible_at timestamptz not null default clock_timestamp(),
        payload bytea not null
      ) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);
      create index on bare_jobs (visible_at, id)`)
    return new BareJobs(clients)
  }

  async reset(): Promise<void> {
    await this.#clients[0]!.query('truncate bare_jobs')
  }

  enqueue(payload: Buffer): Promise<unknown> {
    return this.#query({ ...INSERT, values: [payload] })
  }

  enqueueMany(payloads: readonly Buffer[]): Promise<unknown> {
    return this.#query({ ...INSERT_MANY, values: [payloads] })
  }

  async drain(count: number): Promise<void> {
    let left = count
    await Promise.all(
      this.#clients.slice(0, DRAIN_CONNECTIONS).map(async (client) => {
        while (left > 0) {
          const done = await claimAndDelete(client, BATCH)
          left -= done
        }
      }),
    )
  }

  work(): Promise<AsyncDisposable> {
    return Promise.reject(new Error('bare statements have no worker'))
  }

  async claimOne(): Promise<void> {
    await claimAndDelete(this.#clients[0]!, 1)
  }

  /** The first free connection, as a pool would hand it out. */
  async #query(query: pg.QueryConfig): Promise<unknown> {
    const client = this.#free.pop() ?? (await new Promise<pg.Client>((resolve) => this.#waiting.push(resolve)))
    try {
      return await client.query(query)
    } finally {
      const next = this.#waiting.shift()
      if (next) next(client)
      else this.#free.push(client)
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.#clients.map((client) => client.end()))
  }
}

async function claimAndDelete(client: pg.Client, limit: number): Promise<number> {
  const { rows } = await client.query<{ id: string }>({ ...CLAIM, values: [limit] })
  if (rows.length > 0) await client.query({ ...DELETE, values: [rows.map(({ id }) => id)] })
  return rows.length
}

export const bareJobs: Contender<JobsSession> = {
  name: 'bare statements',
  version,
  settings: `pg, prepared, ${CONNECTIONS} connections; drain: ${DRAIN_CONNECTIONS} loops of claim-${BATCH}, delete-${BATCH}`,
  leaveOut: ['latency', 'snapshot'],
  open: ({ postgresUrl }) => BareJobs.open(postgresUrl),
}

/** Calls of one tick, and those that come while a statement is under way, go out as one statement. */
export const bareGathered: Contender<JobsSession> = {
  name: 'bare inserts, gathered',
  version,
  settings: 'pg, one prepared insert … select unnest on one connection, gathered per tick',
  leaveOut: ['latency', 'snapshot', 'drain'],
  async open({ postgresUrl }) {
    const jobs = await BareJobs.open(postgresUrl)
    let waiting: { payload: Buffer; resolve(value: unknown): void; reject(error: unknown): void }[] = []
    let underWay = false
    const flush = async () => {
      while (waiting.length > 0) {
        const batch = waiting
        waiting = []
        try {
          const answer = await jobs.enqueueMany(batch.map(({ payload }) => payload))
          for (const { resolve } of batch) resolve(answer)
        } catch (error) {
          for (const { reject } of batch) reject(error)
        }
      }
      underWay = false
    }
    return {
      reset: () => jobs.reset(),
      enqueue: (payload) =>
        new Promise((resolve, reject) => {
          waiting.push({ payload, resolve, reject })
          if (underWay) return
          underWay = true
          queueMicrotask(() => void flush())
        }),
      enqueueMany: (payloads) => jobs.enqueueMany(payloads),
      drain: (count) => jobs.drain(count),
      work: () => jobs.work(),
      [Symbol.asyncDispose]: () => jobs[Symbol.asyncDispose](),
    }
  },
}

export const barePingPong: Contender<RequestSession> = {
  name: 'bare LISTEN/NOTIFY',
  version,
  settings: 'pg, two clients, each notifies the other',
  async open({ postgresUrl }) {
    const [asker, answerer] = [new pg.Client({ connectionString: postgresUrl }), new pg.Client({ connectionString: postgresUrl })] as const
    await Promise.all([asker.connect(), answerer.connect()])
    await asker.query('listen bare_pong')
    await answerer.query('listen bare_ping')
    const NOTIFY = { name: 'bare_notify', text: 'select pg_notify($1, $2)' }
    let answering: Promise<unknown> = Promise.resolve()
    answerer.on('notification', ({ payload }) => {
      answering = answerer.query({ ...NOTIFY, values: ['bare_pong', payload] })
    })
    let answered: (() => void) | undefined
    asker.on('notification', () => answered?.())
    return {
      async request(payload) {
        const answer = new Promise<void>((resolve) => {
          answered = resolve
        })
        await asker.query({ ...NOTIFY, values: ['bare_ping', payload.toString('latin1')] })
        await answer
      },
      async [Symbol.asyncDispose]() {
        await answering
        await Promise.all([asker.end(), answerer.end()])
      },
    }
  },
}

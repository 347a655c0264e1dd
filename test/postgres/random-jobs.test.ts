/**
 * A random walk over the job queue, as random-log.test.ts walks over the log: enqueues in transactions of every end, claims
 * that commit late or never, settlements of every kind, also in transactions, reaping, and dead jobs that are put back.
 */

import { afterAll, beforeAll, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/embedded-postgres.ts'
import { type Session, session } from '../support/sessions.ts'

const FIRST_SEED = 1
const WALKS_FOR_MS = 5_000
/** On a machine however slow. */
const LEAST_WALKS = 6
const STEPS = 200
const ENQUEUERS = 4
const KEYS = ['k1', 'k2', 'k3'] as const
const LOCK_NOT_AVAILABLE = '55P03'

interface Enqueued {
  readonly id: number
  readonly key: string | null
  readonly maxAttempts: number
}

interface Claim {
  readonly id: number
  readonly token: string
  readonly attempt: number
  readonly fence: number
  readonly max_attempts: number
  readonly ttl_ms: number
}

let server: EmbeddedPostgres
let enqueuers: Session[]
let claimer: Session
let acker: Session
let settler: Session

beforeAll(async () => {
  server = await startEmbeddedPostgres({ settings: { max_prepared_transactions: '20' } })
  const { connectionString } = server
  await PostgresBus.migrate({ connectionString })
  enqueuers = await Promise.all(Array.from({ length: ENQUEUERS }, () => session(connectionString)))
  claimer = await session(connectionString)
  acker = await session(connectionString)
  settler = await session(connectionString)
  // One session's steps follow another's here: whoever would wait for a transaction of the walk would wait for ever.
  for (const each of [...enqueuers, claimer, acker, settler]) await each.query(`set lock_timeout = '1ms'`)
})

afterAll(async () => {
  await Promise.all([...enqueuers, claimer, acker, settler].map((each) => each[Symbol.asyncDispose]()))
  await server.stop('immediate')
})

/** The same numbers for the same seed. */
function random(seed: number): (below: number) => number {
  let state = BigInt(seed) * 2_862_933_555_777_941_757n + 3_037_000_493n
  return (below) => {
    state = BigInt.asUintN(64, state * 6_364_136_223_846_793_005n + 1_442_695_040_888_963_407n)
    return Number((state >> 33n) % BigInt(below))
  }
}

/** @returns undefined where it would have waited */
async function unlessLocked<T>(work: Promise<T>): Promise<T | undefined> {
  try {
    return await work
  } catch (error) {
    if ((error as { code?: string }).code === LOCK_NOT_AVAILABLE) return undefined
    throw error
  }
}

class Walk {
  readonly #pick: (below: number) => number
  readonly #open: (Enqueued[] | undefined)[] = Array.from({ length: ENQUEUERS })
  readonly #prepared = new Map<string, Enqueued[]>()
  readonly #jobs = new Map<number, Enqueued>()
  readonly #idOfKey = new Map<string, number>()
  readonly #claims: Claim[] = []
  readonly #lastClaim = new Map<number, Claim>()
  readonly #acked = new Set<number>()
  readonly #retries = new Map<number, number>()
  readonly #faults: string[] = []
  #openClaim: Claim[] | undefined
  #openAck: Claim | undefined
  #names = 0

  constructor(seed: number) {
    this.#pick = random(seed)
  }

  async run(): Promise<string[]> {
    await settler.query('truncate klieo.jobs, klieo.messages, klieo.kv_entries, klieo.kv_changes')
    for (let step = 0; step < STEPS; step++) {
      const choice = this.#pick(20)
      if (choice < 7) await this.#enqueuer(this.#pick(ENQUEUERS))
      else if (choice < 8) await this.#endPrepared(this.#pick(4) > 0)
      else if (choice < 12) await this.#claim()
      else if (choice < 17) await this.#settle()
      else if (choice < 18) await this.#ackInTransaction()
      else if (choice < 19) await settler.query('select * from klieo.reap_jobs(5)')
      else await this.#retry()
    }
    await this.#endClaim(true)
    await this.#endAck(true)
    for (const [number, enqueued] of this.#open.entries()) if (enqueued) await this.#end(number, 'commit')
    while (this.#prepared.size > 0) await this.#endPrepared(true)
    await this.#drain()
    await this.#judge()
    return this.#faults
  }

  async #enqueuer(number: number): Promise<void> {
    const client = enqueuers[number]!
    const enqueued = this.#open[number]
    if (!enqueued) {
      await client.query('begin')
      this.#open[number] = []
      return
    }
    const choice = this.#pick(10)
    if (choice < 6) {
      const key = this.#pick(3) === 0 ? KEYS[this.#pick(KEYS.length)]! : null
      const maxAttempts = 1 + this.#pick(3)
      const done = await unlessLocked(
        client.query<{ id: number }>(`select klieo.enqueue('q', 'x', '{}', $1, $2, now(), $3)::int as id`, [
          key,
          maxAttempts,
          this.#pick(3) - 1,
        ]),
      )
      if (done) enqueued.push({ id: done.rows[0]!.id, key, maxAttempts })
      else await this.#end(number, 'rollback')
    } else await this.#end(number, choice < 8 ? 'commit' : choice < 9 ? 'prepare' : 'rollback')
  }

  async #end(number: number, how: 'commit' | 'rollback' | 'prepare'): Promise<void> {
    const enqueued = this.#open[number]!
    this.#open[number] = undefined
    if (how === 'prepare') {
      const name = `p${++this.#names}`
      await enqueuers[number]!.query(`prepare transaction '${name}'`)
      this.#prepared.set(name, enqueued)
      return
    }
    await enqueuers[number]!.query(how)
    if (how === 'commit') this.#committed(enqueued)
  }

  async #endPrepared(commit: boolean): Promise<void> {
    const [entry] = this.#prepared
    if (!entry) return
    this.#prepared.delete(entry[0])
    await settler.query(`${commit ? 'commit' : 'rollback'} prepared '${entry[0]}'`)
    if (commit) this.#committed(entry[1])
  }

  #committed(enqueued: readonly Enqueued[]): void {
    for (const job of enqueued) {
      if (job.key !== null) {
        const first = this.#idOfKey.get(job.key) ?? job.id
        if (first !== job.id) this.#faults.push(`key ${job.key} made job ${job.id} beside ${first}`)
        if (this.#idOfKey.has(job.key)) continue
        this.#idOfKey.set(job.key, job.id)
      }
      this.#jobs.set(job.id, job)
    }
  }

  async #claim(): Promise<void> {
    if (this.#openClaim) return this.#endClaim(this.#pick(5) > 0)
    await claimer.query('begin')
    this.#openClaim = await this.#claimed(claimer, 1 + this.#pick(4), this.#pick(2) * 100_000)
    if (this.#pick(3) > 0) await this.#endClaim(true)
  }

  async #claimed(client: Session, limit: number, ttlMs: number): Promise<Claim[]> {
    const { rows } = await client.query<Claim>(
      `select id::int as id, token, attempt, fence, max_attempts, $1::int as ttl_ms from klieo.claim_jobs('q', 'w', $1, $2)`,
      [ttlMs, limit],
    )
    return rows
  }

  async #endClaim(commit: boolean): Promise<void> {
    const claims = this.#openClaim
    this.#openClaim = undefined
    if (!claims) return
    await claimer.query(commit ? 'commit' : 'rollback')
    if (commit) for (const claim of claims) this.#took(claim)
  }

  #took(claim: Claim): void {
    const last = this.#lastClaim.get(claim.id)
    if (!this.#jobs.has(claim.id)) this.#faults.push(`job ${claim.id} was claimed and never committed`)
    if (this.#acked.has(claim.id)) this.#faults.push(`job ${claim.id} was claimed after its ack`)
    if (claim.attempt > claim.max_attempts) this.#faults.push(`job ${claim.id} had attempt ${claim.attempt} of ${claim.max_attempts}`)
    if (last && claim.fence <= last.fence) this.#faults.push(`job ${claim.id} had fence ${claim.fence} after ${last.fence}`)
    if (claim.attempt !== (last?.attempt ?? 0) + 1 && !(claim.attempt === 1 && this.#retries.has(claim.id))) {
      this.#faults.push(`job ${claim.id} had attempt ${claim.attempt} after ${last?.attempt ?? 0}`)
    }
    this.#lastClaim.set(claim.id, claim)
    this.#claims.push(claim)
  }

  async #settle(): Promise<void> {
    if (this.#claims.length === 0) return
    const [claim] = this.#claims.splice(this.#pick(this.#claims.length), 1)
    const keys = [[claim!.id], [claim!.token]]
    const choice = this.#pick(20)
    if (choice < 8) {
      if ((await settler.query('select * from klieo.ack_jobs($1, $2, true)', keys)).rows.length > 0) this.#ended(claim!)
      else if (claim!.ttl_ms > 0) this.#faults.push(`job ${claim!.id} was taken from a lease that had not run out`)
    } else if (choice < 12) await settler.query('select * from klieo.nak_jobs($1, $2, array[0], array[null]::text[], true)', keys)
    else if (choice < 14) await settler.query('select * from klieo.release_jobs($1, $2)', keys)
    else if (choice < 16) await settler.query(`select * from klieo.dead_letter_jobs($1, $2, array['r'], true)`, keys)
    else if (choice < 18) {
      await unlessLocked(settler.query('select klieo.heartbeat_job($1, $2, 5)', [claim!.id, claim!.token]))
      this.#claims.push(claim!)
    }
    // Else its worker is gone.
  }

  async #ackInTransaction(): Promise<void> {
    if (this.#openAck) return this.#endAck(this.#pick(3) > 0)
    if (this.#claims.length === 0) return
    const [claim] = this.#claims.splice(this.#pick(this.#claims.length), 1)
    await acker.query('begin')
    const done = await unlessLocked(acker.query('select * from klieo.ack_jobs($1, $2)', [[claim!.id], [claim!.token]]))
    if (done && done.rows.length > 0) this.#openAck = claim
    else await acker.query('rollback')
  }

  async #endAck(commit: boolean): Promise<void> {
    const claim = this.#openAck
    this.#openAck = undefined
    if (!claim) return
    await acker.query(commit ? 'commit' : 'rollback')
    if (commit) this.#ended(claim)
  }

  #ended(claim: Claim): void {
    if (this.#acked.has(claim.id)) this.#faults.push(`job ${claim.id} was acked twice`)
    if (claim !== this.#lastClaim.get(claim.id)) this.#faults.push(`job ${claim.id} was acked by an older claim`)
    this.#acked.add(claim.id)
  }

  async #retry(): Promise<void> {
    const { rows } = await settler.query<{ id: number }>('select id::int as id from klieo.jobs where died_at is not null order by id')
    const dead = rows[this.#pick(Math.max(1, rows.length))]
    if (!dead) return
    const retried = await unlessLocked(settler.query<{ count: number }>(`select klieo.retry_dead('q', $1)::int as count`, [dead.id]))
    if (retried && retried.rows[0]!.count > 0) this.#retries.set(dead.id, (this.#retries.get(dead.id) ?? 0) + 1)
  }

  async #drain(): Promise<void> {
    for (;;) {
      await settler.query(`update klieo.jobs set visible_at = clock_timestamp() - interval '1 s' where visible_at > clock_timestamp()`)
      const claims = await this.#claimed(settler, 100, 100_000)
      if (claims.length === 0) return
      for (const claim of claims) {
        this.#took(claim)
        const { rows } = await settler.query('select * from klieo.ack_jobs($1, $2)', [[claim.id], [claim.token]])
        if (rows.length > 0) this.#ended(claim)
      }
    }
  }

  async #judge(): Promise<void> {
    const dead = await this.#idsOf('select id::int as id from klieo.jobs where died_at is not null')
    const living = await this.#idsOf('select id::int as id from klieo.jobs where died_at is null')
    const letters = await this.#idsOf(`select (headers ->> 'dlq_job_id')::int as id from klieo.messages where subject = 'q.dlq'`)
    if (living.length > 0) this.#faults.push(`jobs ${living.join(', ')} never ended`)
    for (const { id } of this.#jobs.values()) {
      const died = dead.includes(id)
      if (died === this.#acked.has(id)) this.#faults.push(`job ${id} is ${died ? 'dead and acked' : 'neither dead nor acked'}`)
      const wanted = (this.#retries.get(id) ?? 0) + (died ? 1 : 0)
      const sent = letters.filter((letter) => letter === id).length
      if (sent !== wanted) this.#faults.push(`job ${id} died ${wanted} times and sent ${sent} dead letters`)
    }
    for (const id of new Set([...dead, ...letters])) if (!this.#jobs.has(id)) this.#faults.push(`job ${id} was never committed`)
  }

  async #idsOf(query: string): Promise<number[]> {
    const { rows } = await settler.query<{ id: number }>(query)
    return rows.map(({ id }) => id)
  }
}

test('J1 to J6 whatever enqueuers, workers and the reaper do, each committed job ends once: acked, or dead with its letter', async () => {
  const end = performance.now() + WALKS_FOR_MS
  let seed = FIRST_SEED
  for (; performance.now() < end || seed - FIRST_SEED < LEAST_WALKS; seed++) {
    expect(await new Walk(seed).run(), `seed ${seed}`).toEqual([])
  }
}, 60_000)

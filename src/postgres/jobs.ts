import {
  type CheckedJob,
  type ClaimedJob,
  type ClaimManyOptions,
  type ClaimOptions,
  checkBatch,
  checkDuration,
  checkEach,
  checkId,
  checkJob,
  checkLimit,
  checkQueue,
  checkSignal,
  type Headers,
  type Job,
  type JobId,
  type JobQueue,
  MAX_WAIT_MS,
  optionsOf,
  type TxOption,
} from '../core/index.ts'
import { AGAIN_AFTER_MS, jittered } from '../runtime/backoff.ts'
import { Batcher } from '../runtime/batcher.ts'
import type { Topic } from '../runtime/bell.ts'
import { type Claim, type ClaimBackend, type ClaimContext, HeldJob } from '../runtime/claimed-job.ts'
import { longPoll } from '../runtime/long-poll.ts'
import type { Whereabouts } from '../runtime/settlement.ts'
import { ACKS_AT_ONCE, asBuffer, fromBase64, packPayloads, pgArray, pgArrayOrNull } from './arrays.ts'
import type { Context } from './context.ts'
import { checkTx, type PostgresTx } from './database.ts'
import {
  ACK_JOB,
  ACK_JOBS,
  CLAIM,
  DEAD_LETTER_JOBS,
  ENQUEUE,
  ENQUEUE_MANY,
  ENQUEUE_ONE,
  ENQUEUE_PLAIN,
  HEARTBEAT_JOB,
  JOB_WHEREABOUTS,
  NAK_JOBS,
  RELEASE_JOBS,
} from './jobs.sql.ts'
import { MAX_STATEMENT_BYTES, tooMuch } from './pubsub.ts'

const MAX_ENQUEUE_BATCH_BYTES = 4 * 1024 * 1024
/** Of payload in one claim. */
const MAX_CLAIM_BYTES = 16 * 1024 * 1024

interface Enqueue {
  readonly queue: string
  readonly job: CheckedJob
}

interface EnqueueRow extends Record<string, unknown> {
  readonly id: string
  readonly added: string
  readonly tx: string
}

interface PgClaim extends Claim {
  readonly token: string
}

interface ClaimRow extends Record<string, unknown> {
  readonly id: string | null
  readonly payload: string
  readonly headers: Headers
  readonly attempt: number
  readonly max_attempts: number
  readonly fence: number
  readonly token: string
  readonly expires_at_ms: string
}

interface Release {
  readonly claim: PgClaim
  readonly counted: boolean
}

interface Claimed {
  readonly jobs: HeldJob<PgClaim, PostgresTx>[]
  /** To the next job, when there was none. */
  readonly dueInMs: number | null
}

interface Nak {
  readonly claim: PgClaim
  readonly delayMs: number
  readonly error: string | undefined
}

export class PostgresJobs implements JobQueue<PostgresTx> {
  readonly #context: Context
  readonly #held = new Set<HeldJob<PgClaim, PostgresTx>>()
  readonly #claims = new Set<Promise<unknown>>()
  readonly #enqueues: Batcher<Enqueue, JobId>
  readonly #acks: Batcher<PgClaim, boolean>
  readonly #naks: Batcher<Nak, boolean>
  readonly #releases: Batcher<Release, boolean>

  constructor(context: Context) {
    this.#context = context
    this.#enqueues = new Batcher((enqueues) => this.#enqueue(enqueues), {
      weight: ({ job }) => job.payload.byteLength,
      maxWeight: MAX_ENQUEUE_BATCH_BYTES,
    })
    this.#acks = new Batcher((claims) => this.#ack(claims), { maxParallel: ACKS_AT_ONCE })
    this.#naks = new Batcher((naks) => this.#nak(naks, false))
    this.#releases = new Batcher((releases) => this.#release(releases))
  }

  async enqueue(queue: string, job: Job, options: TxOption<PostgresTx> = {}): Promise<JobId> {
    this.#context.checkOpen()
    checkQueue(queue)
    const { tx } = optionsOf(options, ['tx'])
    checkTx(tx)
    const enqueue = { queue, job: checkJob(job, this.#context.maxPayloadBytes) }
    if (tx !== undefined) return (await this.#enqueueIn(tx, [enqueue]))[0] as JobId
    // A dedup key may have to wait for somebody's open transaction; nobody else's enqueue waits along.
    if (enqueue.job.dedupKey !== undefined) return (await this.#enqueue([enqueue]))[0] as JobId
    return this.#enqueues.add(enqueue)
  }

  async enqueueMany(queue: string, jobs: readonly Job[], options: TxOption<PostgresTx> = {}): Promise<JobId[]> {
    this.#context.checkOpen()
    checkQueue(queue)
    const { tx } = optionsOf(options, ['tx'])
    checkTx(tx)
    checkBatch('jobs', jobs)
    const enqueues = checkEach('jobs', jobs, (job) => ({ queue, job: checkJob(job, this.#context.maxPayloadBytes) }))
    if (enqueues.length === 0) return []
    return tx === undefined ? this.#enqueue(enqueues) : this.#enqueueIn(tx, enqueues)
  }

  async claim(queue: string, workerId: string, leaseTtlMs: number, options: ClaimOptions = {}): Promise<ClaimedJob<PostgresTx> | null> {
    const { waitMs = 0, signal } = optionsOf(options, ['waitMs', 'signal'])
    return (await this.claimMany(queue, workerId, leaseTtlMs, { limit: 1, waitMs, ...(signal === undefined ? {} : { signal }) }))[0] ?? null
  }

  async claimMany(queue: string, workerId: string, leaseTtlMs: number, options: ClaimManyOptions): Promise<ClaimedJob<PostgresTx>[]> {
    this.#context.checkOpen()
    checkQueue(queue)
    checkId('workerId', workerId)
    checkDuration('leaseTtlMs', leaseTtlMs)
    const { limit, waitMs = 0, signal } = optionsOf(options ?? null, ['limit', 'waitMs', 'signal'])
    checkLimit(limit)
    checkDuration('waitMs', waitMs, 0, MAX_WAIT_MS)
    checkSignal(signal)
    const { clock, bell, pollIntervalMs } = this.#context
    if (waitMs === 0) return signal?.aborted ? [] : (await this.#take(queue, workerId, leaseTtlMs, limit, null)).jobs
    let dueInMs: number | null = null
    const found = await longPoll({
      clock,
      waitMs,
      signal,
      ear: bell.listen({ kind: 'queue', name: queue }),
      attempt: async () => {
        const claimed = await this.#take(queue, workerId, leaseTtlMs, limit, pollIntervalMs)
        dueInMs = claimed.dueInMs
        return claimed.jobs.length > 0 ? claimed.jobs : undefined
      },
      pauseMs: async () => Math.min(jittered(pollIntervalMs), dueInMs ?? pollIntervalMs),
    })
    return found ?? []
  }

  async close(): Promise<void> {
    // What a claim under way brings is handed back, too.
    await Promise.allSettled(this.#claims)
    await Promise.all([...this.#held].map((job) => job.handBack()))
  }

  /** The bus waits for it when it closes, and hands back what it brings. */
  async #take(queue: string, workerId: string, ttlMs: number, limit: number, horizonMs: number | null): Promise<Claimed> {
    const claim = this.#claim(queue, workerId, ttlMs, limit, horizonMs)
    this.#claims.add(claim)
    try {
      return await claim
    } finally {
      this.#claims.delete(claim)
    }
  }

  async #claim(queue: string, workerId: string, ttlMs: number, limit: number, horizonMs: number | null): Promise<Claimed> {
    const { clock, db } = this.#context
    this.#context.checkOpen()
    const askedAt = clock.now()
    const rows = await db.query<ClaimRow>(CLAIM, [queue, workerId, ttlMs, limit, MAX_CLAIM_BYTES, horizonMs], 'claim')
    let dueInMs: number | null = null
    if (rows.at(-1)?.id === null) {
      const word = rows.pop()
      if (word?.fence === 1) this.#context.ringer.ring([deadLetterTopic(queue)])
      dueInMs = word?.max_attempts ?? null
    }
    const context: ClaimContext<PgClaim, PostgresTx> = {
      clock,
      backend: this.#backend,
      ttlMs,
      askedAt,
      checkTx,
      isClosed: this.#context.isClosed,
      onEnd: this.#onEnd,
    }
    const jobs = rows.map((row) => {
      const job = new HeldJob<PgClaim, PostgresTx>(
        {
          id: row.id as string,
          queue,
          token: row.token,
          payload: fromBase64(row.payload),
          headers: row.headers,
          attempt: row.attempt,
          maxAttempts: row.max_attempts,
          fence: row.fence,
          expiresAt: new Date(Number(row.expires_at_ms)),
        },
        context,
      )
      this.#held.add(job)
      return job
    })
    return { jobs, dueInMs }
  }

  readonly #onEnd = (job: HeldJob<PgClaim, PostgresTx>) => void this.#held.delete(job)

  readonly #backend: ClaimBackend<PgClaim, PostgresTx> = {
    ack: (claim, tx, noWait) => (tx === undefined && !noWait ? this.#acks.add(claim) : this.#ackApart(claim, tx, noWait)),
    nak: async (claim, delayMs, error, noWait) => {
      const nak = { claim, delayMs, error }
      const done = noWait ? (await this.#nak([nak], true))[0] === true : await this.#naks.add(nak)
      if (done) this.#ringBack(claim)
      return done
    },
    deadLetter: async (claim, reason, noWait) => {
      const [done] = await this.#settle(DEAD_LETTER_JOBS, [claim], [pgArray([reason]), String(noWait)], 'deadLetter')
      if (done) this.#context.ringer.ring([deadLetterTopic(claim.queue)])
      return done === true
    },
    heartbeat: async (claim, ttlMs, noWait) => {
      const [row] = await this.#context.db.query<{ expires_at_ms: string; extended: boolean }>(
        HEARTBEAT_JOB,
        [claim.id, claim.token, ttlMs, noWait],
        'heartbeat',
      )
      return row ? { expiresAt: new Date(Number(row.expires_at_ms)), extended: row.extended } : null
    },
    whereabouts: async (claim) => {
      const [row] = await this.#context.db.query<{ whereabouts: Whereabouts }>(JOB_WHEREABOUTS, [claim.id, claim.token], 'settle')
      return row?.whereabouts ?? 'gone'
    },
    release: async (claim, counted) => {
      // Passed over while a heartbeat of its own has it locked.
      for (const pauseMs of [0, ...AGAIN_AFTER_MS]) {
        if (pauseMs > 0) await new Promise((resolve) => setTimeout(resolve, pauseMs))
        if (await this.#releases.add({ claim, counted })) break
      }
      this.#ringBack(claim)
    },
  }

  /** It is claimable again or, after its last attempt, dead: then it has published its dead letter. */
  #ringBack({ queue, attempt, maxAttempts }: PgClaim): void {
    this.#context.ringer.ring([queueTopic(queue), ...(attempt >= maxAttempts ? [deadLetterTopic(queue)] : [])])
  }

  /** Keeps nothing of the jobs but what is sent: what they hold, a hundred MiB perhaps, is free while it is under way. */
  #enqueue(enqueues: readonly Enqueue[]): Promise<JobId[]> {
    const [only] = enqueues
    if (only && enqueues.length === 1 && only.job.dedupKey === undefined) return this.#enqueueOne(only).then((id) => [id])
    return this.#send(enqueueParameters(enqueues), topics(enqueues))
  }

  async #send(parameters: readonly unknown[], rung: readonly Topic[]): Promise<JobId[]> {
    const [row] = await this.#context.db.query<{ ids: string }>(ENQUEUE_MANY, parameters, 'enqueue')
    this.#context.ringer.ring(rung)
    return row?.ids.split(',') ?? []
  }

  async #enqueueOne({ queue, job }: Enqueue): Promise<JobId> {
    const { payload, headers, maxAttempts, priority, delayMs, runAt } = job
    const given = JSON.stringify(headers)
    const plain = given === '{}' && maxAttempts === 5 && priority === 0 && delayMs === undefined && runAt === undefined
    const bytes = asBuffer(payload)
    const due = runAt === undefined ? null : timestamp(runAt)
    const [row] = plain
      ? await this.#context.db.query<{ id: string }>(ENQUEUE_PLAIN, [queue, bytes], 'enqueue')
      : await this.#context.db.query<{ id: string }>(
          ENQUEUE_ONE,
          [queue, bytes, given, maxAttempts, priority, delayMs ?? 0, due],
          'enqueue',
        )
    this.#context.ringer.ring([queueTopic(queue)])
    return (row as { id: string }).id
  }

  async #enqueueIn(tx: PostgresTx, enqueues: readonly Enqueue[]): Promise<JobId[]> {
    const rows = await this.#context.db.queryIn<EnqueueRow>(tx, ENQUEUE, enqueueParameters(enqueues), 'enqueue', {
      rows: enqueues.length,
      columns: ['id'],
    })
    const xid = rows[0]?.tx
    if (xid !== undefined) this.#context.ringer.afterCommit(xid, topics(enqueues))
    return rows.map(({ id }) => id)
  }

  async #ackApart(claim: PgClaim, tx: PostgresTx | undefined, noWait: boolean): Promise<boolean> {
    if (tx === undefined) return (await this.#settle(ACK_JOBS, [claim], [String(noWait)], 'ack'))[0] === true
    const expected = { rows: 1, orNone: true, columns: ['id'] }
    return (await this.#context.db.queryIn(tx, ACK_JOBS, [...keys([claim]), String(noWait)], 'ack', expected)).length > 0
  }

  #release(releases: readonly Release[]): Promise<boolean[]> {
    return this.#settleLast(releases, (last) => {
      const claims = last.map(({ claim }) => claim)
      return this.#settle(RELEASE_JOBS, claims, [pgArray(last.map(({ counted }) => String(counted)))], 'release')
    })
  }

  async #ack(claims: readonly PgClaim[]): Promise<boolean[]> {
    const [only] = claims
    if (claims.length === 1 && only) {
      const [row] = await this.#context.db.query<{ done: boolean }>(ACK_JOB, [only.id, only.token], 'ack')
      return [row?.done === true]
    }
    const acks = claims.map((claim) => ({ claim }))
    return this.#settleLast(acks, (last) => {
      return this.#settle(
        ACK_JOBS,
        last.map(({ claim }) => claim),
        ['false'],
        'ack',
      )
    })
  }

  #nak(naks: readonly Nak[], noWait: boolean): Promise<boolean[]> {
    return this.#settleLast(naks, (last) => {
      const claims = last.map(({ claim }) => claim)
      const more = [pgArray(last.map(({ delayMs }) => delayMs)), pgArray(last.map(({ error }) => error ?? null)), String(noWait)]
      return this.#settle(NAK_JOBS, claims, more, 'nak')
    })
  }

  /**
   * A process that claims its own job again may settle both claims in one batch, and the server answers with the ids of jobs.
   * Only the last claim can still be valid, so the others are refused without asking.
   */
  async #settleLast<S extends { readonly claim: PgClaim }>(
    settlements: readonly S[],
    settle: (last: readonly S[]) => Promise<boolean[]>,
  ): Promise<boolean[]> {
    const last = new Map<string, S>()
    for (const settlement of settlements) {
      const { id, fence } = settlement.claim
      const other = last.get(id)
      if (!other || other.claim.fence < fence) last.set(id, settlement)
    }
    if (last.size === settlements.length) return settle(settlements)
    const asked = [...last.values()]
    const answers = await settle(asked)
    const valid = new Set(asked.filter((_, n) => answers[n]))
    return settlements.map((settlement) => valid.has(settlement))
  }

  /** @returns for each claim whether its token was still valid; no job stands there twice */
  async #settle(text: string, claims: readonly PgClaim[], more: readonly unknown[], doing: string): Promise<boolean[]> {
    const rows = await this.#context.db.query<{ id: string }>(text, [...keys(claims), ...more], doing)
    if (rows.length === claims.length) return claims.map(() => true)
    const settled = new Set(rows.map(({ id }) => id))
    return claims.map(({ id }) => settled.has(id))
  }
}

function keys(claims: readonly PgClaim[]): string[] {
  return [pgArray(claims.map(({ id }) => id)), pgArray(claims.map(({ token }) => token))]
}

function enqueueParameters(enqueues: readonly Enqueue[]): unknown[] {
  const jobs = enqueues.map(({ job }) => job)
  const { bytes, starts, lengths } = packPayloads(jobs.map(({ payload }) => payload))
  if (bytes.byteLength > MAX_STATEMENT_BYTES) throw tooMuch('jobs', bytes.byteLength)
  return [
    pgArray(enqueues.map(({ queue }) => queue)),
    bytes,
    starts,
    lengths,
    pgArrayOrNull(
      jobs.map(({ headers }) => JSON.stringify(headers)),
      '{}',
    ),
    pgArrayOrNull(
      jobs.map(({ dedupKey }) => dedupKey ?? null),
      null,
    ),
    pgArrayOrNull(
      jobs.map(({ maxAttempts }) => maxAttempts),
      5,
    ),
    pgArrayOrNull(
      jobs.map(({ delayMs }) => delayMs ?? null),
      null,
    ),
    pgArrayOrNull(
      jobs.map(({ runAt }) => (runAt === undefined ? null : timestamp(runAt))),
      null,
    ),
    pgArrayOrNull(
      jobs.map(({ priority }) => priority),
      0,
    ),
  ]
}

/** Years beyond 9999 and before 1 as Postgres writes them. */
function timestamp(date: Date): string {
  const year = date.getUTCFullYear()
  const rest = date.toISOString().replace(/^[+-]?\d+-/, '-')
  return year > 0 ? `${String(year).padStart(4, '0')}${rest}` : `${String(1 - year).padStart(4, '0')}${rest} BC`
}

function queueTopic(queue: string): Topic {
  return { kind: 'queue', name: queue }
}

function deadLetterTopic(queue: string): Topic {
  return { kind: 'message', name: `${queue}.dlq` }
}

function topics(enqueues: readonly Enqueue[]): Topic[] {
  return [...new Set(enqueues.map(({ queue }) => queue))].map(queueTopic)
}

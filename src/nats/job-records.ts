/**
 * Jobs as NATS keeps them. Each is two entries of a bucket, and a ticket in the work queue:
 *
 *   <queue>.<id>.data    what was enqueued; written once
 *   <queue>.<id>.state   where it stands; written by compare-and-set. None yet: ready, never claimed
 *   ticket               the id, on the subject of its queue: says that there may be something to do, and nothing more
 *
 *   ready ── claim ──▶ running ── ack ──▶ done, and then erased
 *     ▲                   │
 *     └── nak, release ───┴── last attempt, deadLetter, cancel ──▶ dying ── its letter is published ──▶ dead ── retry ──▶ ready
 *
 * The state decides and the ticket may be wrong: one too many finds the job claimed, dead or gone, and is given back or
 * ended; so whoever is not sure that there is a ticket publishes another. Where somebody may die:
 *
 *   enqueue   data, (dedup record,) ticket. Before the ticket: the caller was not told of a job. A later enqueue with its dedup key finds
 *             the record of a job that was never claimed, and publishes the ticket again; so does, after a while, who claims from its queue.
 *   settle    state, then ticket. In between: the ticket comes again when its ack wait is over, and whoever gets it does the rest.
 *   bury      state "dying", letter, state "dead", ticket. Before the letter or after it: likewise; the letter's id makes two of
 *             them one, within the duplicate window of two minutes, which is longer than the ack wait.
 *   retry     state, then ticket. In between: a job that is ready and has no ticket; retried once more it gets one, or likewise.
 *
 * A read may be answered by a leader of the bucket that was replaced and does not know it yet. So no ticket is ended on the strength of a read alone:
 * most servers have to agree, by a write.
 */

import type { Headers } from '../core/index.ts'
import type { Context } from './context.ts'
import { absent, type Entries, type StoredEntry } from './entries.ts'
import { place } from './kv.ts'
import { nameOf, ownId, pack, tokenOf, unpack } from './wire.ts'

export interface JobData {
  readonly id: string
  readonly queue: string
  readonly payload: Uint8Array
  readonly headers: Headers
  readonly maxAttempts: number
  readonly priority: number
  readonly dedupKey: string | undefined
  /** By the server's clock, in ms since 1970, like all times here. */
  readonly enqueuedAt: number
  readonly runAt: number
  readonly payloadBytes: number
  readonly revision: number
}

export interface JobState {
  readonly is: 'ready' | 'running' | 'dying' | 'dead' | 'done'
  readonly attempts: number
  readonly dueAt: number
  /** How often it was retried by an operator: its letters differ by it. */
  readonly round: number
  readonly until?: number
  readonly workerId?: string
  /** Of the last claim: who made it knows his own writes by it. */
  readonly claim?: string
  readonly error?: string
  readonly reason?: string
  readonly diedAt?: number
}

export interface JobRecord {
  readonly data: JobData
  readonly state: JobState
  /** Of the state; 0: none yet. */
  readonly revision: number
}

/** What is enqueued, checked. */
export interface NewJob {
  readonly payload: Uint8Array
  readonly headers: Headers
  readonly dedupKey: string | undefined
  readonly maxAttempts: number
  readonly priority: number
  readonly runAt: number | undefined
}

const MAX_ATTEMPTS = 'klieo-max-attempts'
const PRIORITY = 'klieo-priority'
const RUN_AT = 'klieo-run-at'
const DEDUP_KEY = 'klieo-dedup-key'
/** No queue has a job of this name. */
const PAUSE = '=pause'

const LONGEST_REASON = 4_000
export const MAX_ATTEMPTS_EXCEEDED = 'max_attempts_exceeded'
/** What is wrong with a job whose worker died at the last attempt. */
export const LEASE_RAN_OUT = 'the lease of the last attempt ran out'

const encoder = new TextEncoder()
const decoder = new TextDecoder()

export class JobRecords {
  readonly #context: Context
  readonly #entries: Entries
  /** Where the dedup records are. */
  readonly #kv: Entries
  #lastMs = 0
  #count = 0

  constructor(context: Context, entries: Entries, kv: Entries) {
    this.#context = context
    this.#entries = entries
    this.#kv = kv
  }

  /** Digits that grow: the server's time, a count within the millisecond, and chance. */
  newId(): string {
    const ms = Math.max(Math.floor(this.#context.serverClock.now()), this.#lastMs)
    this.#count = ms === this.#lastMs ? this.#count + 1 : 0
    this.#lastMs = ms
    const chance = Math.floor(Math.random() * 1e6)
    return `${String(ms).padStart(13, '0')}${String(this.#count).padStart(6, '0')}${String(chance).padStart(6, '0')}`
  }

  async writeData(queue: string, id: string, job: NewJob): Promise<number> {
    const { headers, payload } = pack(job.payload, job.headers, {
      [MAX_ATTEMPTS]: String(job.maxAttempts),
      [PRIORITY]: String(job.priority),
      ...(job.runAt === undefined ? {} : { [RUN_AT]: String(job.runAt) }),
      ...(job.dedupKey === undefined ? {} : { [DEDUP_KEY]: Buffer.from(job.dedupKey).toString('base64url') }),
    })
    return (await this.#entries.write(this.#key(queue, id, 'data'), payload, undefined, undefined, headers)) as number
  }

  erase(revision: number): Promise<void> {
    return this.#entries.erase(revision)
  }

  /** @param round with the same one within two minutes it is one ticket */
  async ticket(queue: string, id: string, round: number | string): Promise<void> {
    const { js, names } = this.#context
    await this.#context.ask(() => js.publish(names.ticket(tokenOf(queue)), id, { msgID: ownId('ticket', id, round) }))
  }

  /** @returns the id of the job that has the key: this one's or an earlier one's */
  async record(queue: string, dedupKey: string, id: string, windowMs: number): Promise<string> {
    const key = place(`dedup.${queue}`, dedupKey)
    for (;;) {
      const last = await this.#kv.read(key)
      if (last && !last.deleted) {
        const first = decoder.decode(last.value)
        if (!last.expired || (await this.read(queue, first))) return first
      }
      if ((await this.#kv.write(key, encoder.encode(id), last?.revision ?? 0, windowMs)) !== null) return id
    }
  }

  async read(queue: string, id: string): Promise<JobRecord | null> {
    // In the order in which the server reads them: what is forgotten loses its data first, so without a state it is one that nobody has claimed.
    const [state, data] = await Promise.all([
      this.#entries.read(this.#key(queue, id, 'state')),
      this.#entries.read(this.#key(queue, id, 'data')),
    ])
    return data && !data.deleted ? recordOf(data, state) : null
  }

  /** By the id alone. */
  async find(id: string): Promise<JobRecord | null> {
    // What is no id of ours could be a wildcard.
    if (!isJobId(id)) return null
    const data = await this.#entries.read(`*.${id}.data`)
    if (!data || data.deleted) return null
    const record = await this.read(dataOf(data).queue, id)
    return record?.state.is === 'done' ? null : record
  }

  /** @returns the new revision, or `null` when the state was another one by then */
  write({ data, revision }: JobRecord, state: JobState): Promise<number | null> {
    return this.#entries.write(this.#key(data.queue, data.id, 'state'), encoder.encode(JSON.stringify(state)), revision)
  }

  /** After the state "done". */
  async forget(data: JobData, stateRevision: number): Promise<void> {
    await this.#entries.erase(data.revision)
    await this.#entries.erase(stateRevision)
  }

  /** What was not there when it was read. */
  async isGone(queue: string, id: string): Promise<boolean> {
    return !this.#context.isReplicated || this.#entries.isBare(this.#key(queue, id, 'data'))
  }

  /** The job of a ticket is gone; its state may be left. */
  async forgetState(queue: string, id: string): Promise<void> {
    const state = await this.#entries.read(this.#key(queue, id, 'state'))
    if (state) await this.#entries.erase(state.revision)
  }

  /** In the order of ids. */
  async all(queue?: string): Promise<JobRecord[]> {
    const token = queue === undefined ? '*' : tokenOf(queue)
    const [data, states] = await Promise.all([this.#entries.all(`${token}.*.data`, true), this.#entries.all(`${token}.*.state`)])
    const byJob = new Map(states.map((state) => [jobOf(state.key), state]))
    const stored = data.filter(({ deleted }) => !deleted)
    const records = stored.map((entry) => recordOf(entry, byJob.get(jobOf(entry.key)) ?? null))
    return records.filter(({ state }) => state.is !== 'done').sort((a, b) => (a.data.id < b.data.id ? -1 : 1))
  }

  pauseSubject(queue: string): string {
    return this.#entries.subject(`${tokenOf(queue)}.${PAUSE}`)
  }

  /** Since when; `null`: it is not. */
  async pausedAt(queue: string): Promise<number | null> {
    const entry = await this.#entries.read(`${tokenOf(queue)}.${PAUSE}`)
    return entry && !absent(entry) ? entry.storedAt : null
  }

  async paused(): Promise<Map<string, number>> {
    const entries = (await this.#entries.all(`*.${PAUSE}`)).filter((entry) => !absent(entry))
    return new Map(entries.map((entry) => [nameOf(entry.key.slice(0, entry.key.indexOf('.'))), entry.storedAt]))
  }

  async pause(queue: string): Promise<void> {
    const last = await this.#entries.read(`${tokenOf(queue)}.${PAUSE}`)
    if (last && !absent(last)) return
    await this.#entries.write(`${tokenOf(queue)}.${PAUSE}`, encoder.encode('paused'), undefined)
  }

  async resume(queue: string): Promise<void> {
    await this.#entries.remove(`${tokenOf(queue)}.${PAUSE}`, undefined)
  }

  /**
   * Makes it dead, with its letter.
   * @returns false when the state was another one by then
   */
  async bury(record: JobRecord, reason: string, error: string | undefined): Promise<boolean> {
    const dying = this.dying(record.state, reason, error)
    const revision = await this.write(record, dying)
    if (revision === null) return false
    await this.finishBurying({ data: record.data, state: dying, revision })
    return true
  }

  dying({ round, attempts, dueAt, claim, error: before }: JobState, reason: string, error: string | undefined): JobState {
    // What somebody says of it is more than what a handler said before.
    const said = reason === MAX_ATTEMPTS_EXCEEDED ? (error ?? before) : undefined
    return {
      is: 'dying',
      attempts,
      dueAt,
      round,
      reason: beginning(reason),
      diedAt: this.#context.serverClock.now(),
      ...(said === undefined ? {} : { error: said }),
      ...(claim === undefined ? {} : { claim }),
    }
  }

  /** From "dying" on; whoever finds such a job does it. @returns false when the state was another one by then: somebody else may have done it, too */
  async finishBurying(record: JobRecord): Promise<boolean> {
    const { js, names } = this.#context
    const { data, state } = record
    const { payload, headers } = await this.#withPayload(data)
    const letter = pack(payload, {
      ...headers,
      dlq_reason: oneLine(state.reason ?? ''),
      dlq_queue: data.queue,
      dlq_job_id: data.id,
      dlq_attempts: String(state.attempts),
      ...(data.dedupKey === undefined ? {} : { dlq_dedup_key: oneLine(data.dedupKey) }),
      ...(state.error === undefined ? {} : { dlq_error: oneLine(state.error) }),
    })
    await this.#context.ask(() =>
      js.publish(names.message(`${data.queue}.dlq`), letter.payload, {
        headers: letter.headers,
        msgID: ownId('dead', data.id, state.round),
      }),
    )
    return (await this.write(record, { ...state, is: 'dead' })) !== null
  }

  /** What lists read has headers only. */
  async #withPayload(data: JobData): Promise<JobData> {
    if (data.payload.byteLength === data.payloadBytes) return data
    return (await this.read(data.queue, data.id))?.data ?? data
  }

  #key(queue: string, id: string, what: 'data' | 'state'): string {
    return `${tokenOf(queue)}.${id}.${what}`
  }
}

export function isJobId(id: string): boolean {
  return /^[0-9]{25}$/.test(id)
}

function jobOf(key: string): string {
  return key.slice(0, key.lastIndexOf('.'))
}

function recordOf(data: StoredEntry, state: StoredEntry | null): JobRecord {
  const read = dataOf(data)
  if (!state) return { data: read, state: { is: 'ready', attempts: 0, dueAt: read.runAt, round: 0 }, revision: 0 }
  return { data: read, state: JSON.parse(decoder.decode(state.value)) as JobState, revision: state.revision }
}

function dataOf(entry: StoredEntry): JobData {
  const [queue = '', id = ''] = entry.key.split('.')
  const { headers, payload } = unpack(entry.headers, entry.value)
  const get = (name: string) => entry.headers?.get(name) || undefined
  const dedup = get(DEDUP_KEY)
  const packed = Number(get('klieo-packed') ?? 0)
  return {
    id,
    queue: nameOf(queue),
    payload,
    headers,
    maxAttempts: Number(get(MAX_ATTEMPTS)),
    priority: Number(get(PRIORITY)),
    dedupKey: dedup === undefined ? undefined : Buffer.from(dedup, 'base64url').toString(),
    enqueuedAt: entry.storedAt,
    runAt: Number(get(RUN_AT) ?? entry.storedAt),
    payloadBytes: entry.bytes - packed,
    revision: entry.revision,
  }
}

/** A header holds no line breaks. */
function oneLine(text: string): string {
  return text.replaceAll(/[\r\n]+/g, ' ')
}

/** So much of a reason is kept, in characters. */
function beginning(text: string): string {
  return text.length <= LONGEST_REASON ? text : [...text].slice(0, LONGEST_REASON).join('')
}

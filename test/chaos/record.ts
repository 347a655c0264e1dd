/**
 * What a chaos run writes down, and all that its checker sees: one JSON object a line, one file a process.
 *
 * Every call is written twice: before it is made and when it has been answered, each synchronously, so that a process that
 * is killed leaves the calls it had under way as calls without an answer: they may or may not have happened. Times are
 * microseconds of the machine's monotonic clock, which all processes share.
 */

import { openSync, writeSync } from 'node:fs'

/** What a call asks for. Whatever is written is named by an id that no other call uses, and carries it as its payload. */
export type Call =
  /** @property order counts the publishes of this publisher to this subject; `after`: that of the last whose publish had resolved before this transaction (or call) began, or 0 */
  | {
      readonly do: 'publish'
      readonly id: string
      readonly subject: string
      readonly publisher: string
      readonly order: number
      readonly after: number
      readonly msgId?: string
      readonly tx?: string
    }
  | {
      readonly do: 'enqueue'
      readonly id: string
      readonly queue: string
      readonly maxAttempts: number
      readonly dedupKey?: string
      readonly tx?: string
    }
  /** The end of a transaction of ours: `tx` names it. `commit` may be COMMIT PREPARED, and stand in another process than its calls. */
  | { readonly do: 'commit' | 'rollback'; readonly tx: string }
  /** One delivery, by the call that settles it. `attempt` is that of the delivery. `tx`: with `ack({ tx })`. */
  | {
      readonly do: 'ack' | 'nak' | 'term' | 'extend'
      readonly durable: string
      readonly seq: number
      readonly attempt: number
      readonly delayMs?: number
      readonly tx?: string
    }
  | { readonly do: 'claim'; readonly queue: string; readonly limit: number; readonly ttlMs: number }
  | {
      readonly do: 'jobAck' | 'jobNak' | 'jobHeartbeat' | 'jobDeadLetter'
      readonly job: string
      readonly attempt: number
      readonly ttlMs: number
      readonly delayMs?: number
      readonly tx?: string
    }
  /** A worker or a closing bus gives a job back that nobody has begun: its attempt may be taken back, and the number used again. */
  | { readonly do: 'jobPutBack'; readonly job: string; readonly attempt: number }
  | { readonly do: 'lease'; readonly key: string; readonly ttlMs: number; readonly waitMs: number }
  | { readonly do: 'leaseHeartbeat' | 'leaseRelease'; readonly key: string; readonly fence: number; readonly ttlMs: number }
  | { readonly do: 'get'; readonly key: string }
  /** `value` is an id. `expected`: of a cas (null: absent) or a conditional delete; left out: unconditional. */
  | { readonly do: 'put'; readonly key: string; readonly value: string; readonly tx?: string }
  | { readonly do: 'cas'; readonly key: string; readonly value: string; readonly expected: number | null; readonly tx?: string }
  | { readonly do: 'delete'; readonly key: string; readonly expected?: number; readonly tx?: string }
  | { readonly do: 'request'; readonly id: string; readonly subject: string; readonly timeoutMs: number }
  /** A bus closes: what it held goes back at once. With `stream` only that one does: what it had not yielded goes back, uncounted. */
  | { readonly do: 'close'; readonly member: string; readonly stream?: string }

/** What a call that succeeded answered, by `do`. Those that are not listed answer nothing. */
export interface Answers {
  readonly publish: { readonly seq: number; readonly duplicate: boolean }
  readonly enqueue: { readonly job: string }
  readonly claim: { readonly jobs: readonly ClaimedJobRecord[] }
  readonly lease: { readonly fence: number }
  readonly get: { readonly value: string | null; readonly revision: number | null }
  readonly put: { readonly revision: number }
  readonly cas: { readonly revision: number }
  readonly request: { readonly reply: string }
}

export interface ClaimedJobRecord {
  readonly job: string
  /** The id of the enqueue that made it, read from its payload. */
  readonly id: string
  readonly attempt: number
}

export type Entry =
  | { readonly kind: 'call'; readonly op: number; readonly at: number; readonly call: Call }
  | { readonly kind: 'ok'; readonly op: number; readonly at: number; readonly answer?: Answers[keyof Answers] }
  /** `actual`: of a cas_conflict. `code` is the BusError's; one of the driver's, from a transaction of ours, is `sql:` and its SQLSTATE or text. */
  | {
      readonly kind: 'err'
      readonly op: number
      readonly at: number
      readonly code: string
      readonly retryable: boolean
      readonly actual?: number | null
    }
  /**
   * A stream yielded a message. `stream` names this stream of this process; `id` was read from the payload; `ackWaitMs` is the
   * durable's. `handedOutAfter`: where the stream holds one message at a time, the time at which it was asked for this one.
   */
  | {
      readonly kind: 'delivered'
      readonly at: number
      readonly stream: string
      readonly member: string
      readonly durable: string
      readonly ackWaitMs: number
      readonly id: string
      readonly subject: string
      readonly seq: number
      readonly attempt: number
      readonly dlq?: Readonly<Record<string, string>>
      readonly handedOutAfter?: number
    }
  /** A responder began with a request. */
  | { readonly kind: 'handling'; readonly at: number; readonly id: string }
  /** What was done to the system: `kill`, `restart`, … and to what. */
  | { readonly kind: 'fault'; readonly at: number; readonly fault: string; readonly target?: string }
  /** What every process begins with. */
  | { readonly kind: 'process'; readonly at: number; readonly name: string; readonly role: string; readonly pid: number }

/** The tables after the run, when everything that could be consumed has been. The runner writes it as `final.json`. */
export interface FinalState {
  /** Every durable of the run, its filter, and whether it existed before the first publish; `unsettled`: seqs still in flight or unread. */
  readonly durables: readonly {
    readonly name: string
    readonly filter: string
    readonly maxDeliver: number | null
    readonly unsettled: readonly number[]
  }[]
  /** Every stored message (retention does not run out during a run). `id` is null where the payload is none of ours. */
  readonly messages: readonly {
    readonly seq: number
    readonly id: string | null
    readonly subject: string
    readonly headers: Readonly<Record<string, string>>
  }[]
  /** Every job that still exists. */
  readonly jobs: readonly {
    readonly job: string
    readonly id: string
    readonly queue: string
    readonly state: string
    readonly attempts: number
    readonly maxAttempts: number
  }[]
  readonly entries: readonly { readonly key: string; readonly value: string; readonly revision: number }[]
}

/** Microseconds of the machine's monotonic clock. */
export function now(): number {
  return Number(process.hrtime.bigint() / 1000n)
}

/** Appends entries to a file; what {@link write} has returned from is in the file, whatever happens to the process. */
export class Recorder {
  readonly #file: number
  #ops = 0

  constructor(path: string) {
    this.#file = openSync(path, 'a')
  }

  write(entry: Entry): void {
    writeSync(this.#file, `${JSON.stringify(entry)}\n`)
  }

  /** Writes the call down, makes it, and writes its answer down. Rejects as the call does. */
  async call<T>(call: Call, make: () => Promise<T>, answer?: (result: T) => Answers[keyof Answers]): Promise<T> {
    const op = ++this.#ops
    this.write({ kind: 'call', op, at: now(), call })
    try {
      const result = await make()
      this.write({ kind: 'ok', op, at: now(), ...(answer ? { answer: answer(result) } : {}) })
      return result
    } catch (error) {
      this.write({ kind: 'err', op, at: now(), ...refusal(error) })
      throw error
    }
  }

  /** The same for a call of the bus that does many things, all or none: each is an operation of its own. */
  async callMany<T>(
    calls: readonly Call[],
    make: () => Promise<readonly T[]>,
    answer: (result: T) => Answers[keyof Answers],
  ): Promise<void> {
    const ops = calls.map(() => ++this.#ops)
    calls.forEach((call, n) => {
      this.write({ kind: 'call', op: ops[n]!, at: now(), call })
    })
    try {
      const results = await make()
      ops.forEach((op, n) => {
        this.write({ kind: 'ok', op, at: now(), answer: answer(results[n]!) })
      })
    } catch (error) {
      for (const op of ops) this.write({ kind: 'err', op, at: now(), ...refusal(error) })
      throw error
    }
  }
}

function refusal(error: unknown): { code: string; retryable: boolean; actual?: number | null } {
  const { code, retryable, actual, message } = error as { code?: unknown; retryable?: unknown; actual?: number | null; message?: string }
  const ours = (error as { name?: string }).name === 'BusError'
  return {
    code: ours ? String(code) : `sql:${String(code ?? message)}`,
    retryable: retryable === true,
    ...(actual === undefined ? {} : { actual }),
  }
}

/**
 * The contract: what every backend offers. The vocabulary and the behaviour follow NATS JetStream and NATS KV; the
 * rules (P1 … J8) that the comments cite are tested by the conformance suite in `klieo-bus/testing`.
 *
 * Durations are integers in milliseconds, 0 to 2,147,483,647. Every rejection is a {@link BusError}.
 */

import type { Admin } from './admin.ts'
import type { BusError } from './errors.ts'

/** Names are printable ASCII without `:` and space, case-sensitive; values hold no CR, LF or NUL; together at most 64 KiB. */
export type Headers = Readonly<Record<string, string>>
/** A string is stored as its UTF-8 bytes. */
export type Payload = Uint8Array | string
/** A safe integer, at least 1; grows with every change of a key, for ever. */
export type Revision = number
/** Opaque, stable, unique in the bus. */
export type JobId = string

/** The caller's open transaction, for the calls that can take part in it. */
export interface TxOption<Tx> {
  readonly tx?: Tx
}

/** What a backend can do, as data. Tests skip by it, never by the backend's name. */
export interface Capabilities {
  readonly backend: string
  /** Calls take `tx`. */
  readonly transactions: boolean
  /** What was acknowledged survives the end of the process. */
  readonly persistent: boolean
  /** Several processes share it. */
  readonly shared: boolean
  /** `kv.watch` works. */
  readonly watch: boolean
  /** Of messages (P7). `strict`: a stale holder is refused by the server; `local`: by its own clock only. */
  readonly fencing: 'strict' | 'local'
  /** Likewise of jobs (J6). @default as `fencing` */
  readonly jobFencing?: 'strict' | 'local'
  /** `kv.get` sees a write that resolved before, from every process (K4). */
  readonly readYourWrites: boolean
  /** Jobs honour `priority` (J8). */
  readonly priorities: boolean
  /** `admin.durables` tells what waits to be handed out again from what is in flight (A1). */
  readonly redeliveryCounts: boolean
}

/** The bus: four interfaces, what an operator needs, and one life. */
export interface Bus<Tx = never> extends AsyncDisposable {
  readonly pubsub: Pubsub<Tx>
  readonly requestReply: RequestReply
  readonly kv: KvStore<Tx>
  readonly jobs: JobQueue<Tx>
  /** What an operator does: look, retry, cancel, remove, pause, seek, purge. */
  readonly admin: Admin
  readonly supports: Capabilities
  /** Idempotent. Stops streams, responders and workers, and hands everything unsettled back at once. */
  close(): Promise<void>
}

// ---------------------------------------------------------------- publish / subscribe

export interface Message {
  readonly subject: string
  readonly payload: Payload
  readonly headers?: Headers
  /** A second publish with the same id within 2 minutes stores nothing (P12). 1 to 512 characters. */
  readonly msgId?: string
}

export interface PublishOptions<Tx = never> extends TxOption<Tx> {
  readonly headers?: Headers
  readonly msgId?: string
}

export interface PubAck {
  /** The stored message's number; for a duplicate, the first one's. */
  readonly seq: number
  readonly duplicate: boolean
}

export interface SubscribeOptions {
  /** Visibility timeout of a delivery. @default 30_000 */
  readonly ackWaitMs?: number
  /** Deliveries before the message goes to `<durable>.dlq`; at least 1. @default unlimited */
  readonly maxDeliver?: number
  /** Handed out and unsettled at once for the whole durable; redeliveries are exempt. @default 1_000 */
  readonly maxAckPending?: number
  /** Handed out and unsettled at once for this stream. @default 256 */
  readonly maxInFlight?: number
  /** Where a durable that does not exist yet begins. @default 'all' */
  readonly start?: 'all' | 'new' | { readonly seq: number } | { readonly time: Date }
  /** Aborting it closes the stream. */
  readonly signal?: AbortSignal
  /**
   * Told when what was fetched has not been yielded, and the stream goes on: a fetch failed (the connection was lost, the server is away), it came
   * too late, or nobody asked for its messages. They come again, and perhaps behind others that were published after them.
   */
  readonly onInterrupted?: (error: BusError) => void
}

export interface Pubsub<Tx = never> {
  /**
   * Resolves once the message is durable; with `tx`, once it is part of that transaction (P1).
   * @throws invalid_argument, payload_too_large, closed, connection, unavailable
   */
  publish(subject: string, payload: Payload, options?: PublishOptions<Tx>): Promise<PubAck>
  /** All or none, in this order (P8). The acks stand in the order of the messages. */
  publishMany(messages: readonly Message[], options?: TxOption<Tx>): Promise<PubAck[]>
  /**
   * Joins the durable, creating it if there is none. Members share its messages (P3). The options are this stream's own;
   * `start` counts only when the durable is created.
   * @throws conflict when the durable exists with another filter (P11)
   */
  subscribe(subject: string, durable: string, options?: SubscribeOptions): Promise<MsgStream<Tx>>
  /** @throws not_found if there is none */
  deleteDurable(durable: string): Promise<void>
}

/**
 * The messages of one member of a durable. Leaving a `for await` loop does not close the stream: iterate again to go
 * on, `close()` (or `await using`) to hand back what was fetched and not yielded (P10).
 */
export interface MsgStream<Tx = never> extends AsyncIterable<Msg<Tx>>, AsyncDisposable {
  close(): Promise<void>
}

/** One delivery of a message. Settle it once: `ack`, `nak` or `term`. */
export interface Msg<Tx = never> {
  readonly subject: string
  readonly payload: Uint8Array
  readonly headers: Headers
  readonly seq: number
  /** 1 on the first delivery. */
  readonly attempt: number
  readonly publishedAt: Date
  /** With `tx` it takes effect with that transaction (P7). @throws lease_lost, already_settled */
  ack(options?: TxOption<Tx>): Promise<void>
  /** Asks for redelivery, not before `delayMs`. @default 0 */
  nak(delayMs?: number): Promise<void>
  /** Ends the message for this durable (P6). */
  term(reason?: string): Promise<void>
  /** Restarts the visibility timeout. NATS calls it "in progress". */
  extend(): Promise<void>
}

// ---------------------------------------------------------------- request / reply

export interface RequestOptions {
  readonly timeoutMs: number
  readonly headers?: Headers
  readonly signal?: AbortSignal
}

export interface Request {
  readonly subject: string
  readonly payload: Uint8Array
  readonly headers: Headers
  /** Aborted when the deadline is over or the responder closes. */
  readonly signal: AbortSignal
}

export interface RespondOptions {
  /** Requests handled at once by this responder. @default 16 */
  readonly concurrency?: number
}

export interface Responder extends AsyncDisposable {
  close(): Promise<void>
}

export interface RequestReply {
  /**
   * Asks one live responder and resolves with its reply.
   * @throws not_found (no live responder, R2), timeout, handler_failed (R3)
   */
  request(subject: string, payload: Payload, options: RequestOptions): Promise<Uint8Array>
  /** Answers requests on a subject, which may hold wildcards. Several responders share the load (R1). */
  respond(subject: string, handler: (request: Request) => Payload | Promise<Payload>, options?: RespondOptions): Promise<Responder>
}

// ---------------------------------------------------------------- key-value

export interface KvEntry {
  readonly key: string
  readonly value: Uint8Array
  readonly revision: Revision
  readonly updatedAt: Date
}

export type KvChange =
  | { readonly operation: 'put'; readonly entry: KvEntry }
  | { readonly operation: 'delete'; readonly key: string; readonly revision: Revision }

export interface KvPutOptions<Tx = never> extends TxOption<Tx> {
  /** The entry is absent once this is over. @default never */
  readonly ttlMs?: number
}

export interface KvDeleteOptions<Tx = never> extends TxOption<Tx> {
  /** Delete only while the key is at this revision (K3). */
  readonly expected?: Revision
}

export interface KvWatchOptions {
  readonly signal?: AbortSignal
  /** Leave out the entries that are there already. @default false */
  readonly updatesOnly?: boolean
}

export interface KvWatch extends AsyncIterable<KvChange>, AsyncDisposable {
  close(): Promise<void>
}

export interface LeaseOptions {
  /** Wait so long for the holder to go. @default 0 */
  readonly waitMs?: number
  readonly signal?: AbortSignal
}

export interface Lease extends AsyncDisposable {
  /** Grows with every grant of this key: hand it to whatever the lease protects. */
  readonly fence: number
  /** As of the last heartbeat. */
  readonly expiresAt: Date
  /** Aborted when the lease is known to be lost. */
  readonly signal: AbortSignal
  /** Extends by the ttl. @throws lease_lost once it ran out or someone else holds it */
  heartbeat(): Promise<void>
  /** Idempotent; what `await using` calls. Does nothing to a later holder. */
  release(): Promise<void>
}

export interface KvStore<Tx = never> {
  /** `null` while the key is absent: never written, deleted or expired. */
  get(bucket: string, key: string): Promise<KvEntry | null>
  put(bucket: string, key: string, value: Payload, options?: KvPutOptions<Tx>): Promise<Revision>
  /** Writes only while the key is at `expected`; `null` means absent (K2). @throws cas_conflict with `expected` and `actual` */
  cas(bucket: string, key: string, value: Payload, expected: Revision | null, options?: KvPutOptions<Tx>): Promise<Revision>
  /** Succeeds for an absent key, too (K3). @throws cas_conflict with `expected` */
  delete(bucket: string, key: string, options?: KvDeleteOptions<Tx>): Promise<void>
  /** The present keys, in no promised order. `filter`: tokens between dots, `*` and `>` as in subjects. */
  keys(bucket: string, filter?: string): AsyncIterable<string>
  /** The present entries, then every change, in revision order per key (K6). */
  watch(bucket: string, filter?: string, options?: KvWatchOptions): Promise<KvWatch>
  /** An exclusive lease, apart from the key's value (K5). @throws lease_held */
  lease(bucket: string, key: string, ttlMs: number, options?: LeaseOptions): Promise<Lease>
}

// ---------------------------------------------------------------- jobs

export interface Job {
  readonly payload: Payload
  readonly headers?: Headers
  /** A later enqueue with it answers the first job's id and adds nothing (J5). 1 to 512 characters. */
  readonly dedupKey?: string
  /** Claims before the job is dead; at least 1. @default 5 */
  readonly maxAttempts?: number
  /** Not claimable before. At most one of `delayMs` and `runAt`. @default 0 */
  readonly delayMs?: number
  readonly runAt?: Date
  /** An integer from -100 to 100; higher first. @default 0 */
  readonly priority?: number
}

export interface ClaimOptions {
  /** Wait so long for a job to come in; 0 to 30_000. @default 0 */
  readonly waitMs?: number
  readonly signal?: AbortSignal
}

export interface ClaimManyOptions extends ClaimOptions {
  /** At most so many jobs; 1 to 1_000. */
  readonly limit: number
}

export interface NakOptions {
  /** Kept with the job and sent along with its dead letter as `dlq_error`. */
  readonly error?: string
}

export interface ClaimedJob<Tx = never> {
  readonly id: JobId
  readonly queue: string
  readonly payload: Uint8Array
  readonly headers: Headers
  /** 1 on the first claim. */
  readonly attempt: number
  readonly maxAttempts: number
  readonly lease: Lease
  /** The same as `lease.heartbeat()`. */
  heartbeat(): Promise<void>
  /** The job is done and goes away. @throws lease_lost, already_settled */
  ack(options?: TxOption<Tx>): Promise<void>
  /** Puts it back. Without a delay: exponential backoff with jitter. On the last attempt the job is dead at once (J4). */
  nak(delayMs?: number, options?: NakOptions): Promise<void>
  /** The job is dead: it stays inspectable, and its dead letter goes to `<queue>.dlq` (J4). */
  deadLetter(reason: string): Promise<void>
}

export interface JobQueue<Tx = never> {
  /** Resolves once the job is durable; with `tx`, once it is part of that transaction (J1). */
  enqueue(queue: string, job: Job, options?: TxOption<Tx>): Promise<JobId>
  /** All or none. The ids stand in the order of the jobs. */
  enqueueMany(queue: string, jobs: readonly Job[], options?: TxOption<Tx>): Promise<JobId[]>
  /** Claims the best claimable job for `leaseTtlMs`; `null` when there is none (J7, J8). */
  claim(queue: string, workerId: string, leaseTtlMs: number, options?: ClaimOptions): Promise<ClaimedJob<Tx> | null>
  claimMany(queue: string, workerId: string, leaseTtlMs: number, options: ClaimManyOptions): Promise<ClaimedJob<Tx>[]>
}

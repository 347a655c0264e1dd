/**
 * What is measured, seen from a scenario: one shape per kind of system. A contender is run in a child process of its own, one
 * scenario at a time, so that neither heap nor compiled code of another one is in its way.
 */

/** Where the servers are. A contender takes what it needs. */
export interface Servers {
  /** A PostgreSQL database of its own for each contender. */
  readonly postgresUrl: string
  readonly redisUrl?: string
  readonly natsUrl?: string
}

export interface Contender<Session> {
  /** As in the table, such as `graphile-worker, tuned`. */
  readonly name: string
  /** Of the library, and of its server where that is not the PostgreSQL of the run. */
  version(): Promise<string>
  /** What was set and why, in one line: the README's own advice. */
  readonly settings: string
  open(servers: Servers): Promise<Session>
  /** Whose CPU counts as the server's. @default 'postgres' */
  readonly server?: 'postgres' | 'redis' | 'nats'
  /** How many jobs the drain is given: fewer for one that would take minutes. @default 100_000 */
  readonly drains?: number
  /** Scenarios that say nothing about it. @default none */
  readonly leaveOut?: readonly string[]
}

export interface JobsSession extends AsyncDisposable {
  /** Nothing is stored afterwards. */
  reset(): Promise<void>
  /** Resolves when the job is durable. */
  enqueue(payload: Buffer): Promise<unknown>
  /** One call of the bulk interface. */
  enqueueMany(payloads: readonly Buffer[]): Promise<unknown>
  /** Handles `count` stored jobs by a handler that does nothing, with its best settings; resolves when the last one's end is durable. */
  drain(count: number): Promise<void>
  /** A worker for latencies: `onStart` is called as the first thing in the handler. Stopped by its disposal. */
  work(onStart: (payload: Buffer) => void): Promise<AsyncDisposable>
}

export interface LogSession extends AsyncDisposable {
  reset(): Promise<void>
  /** Resolves when the message is acknowledged by the server. */
  publish(payload: Buffer): Promise<unknown>
  publishMany(payloads: readonly Buffer[]): Promise<unknown>
  /** Makes `durables` consumers of the whole log before anything is published. */
  addDurables(durables: number): Promise<void>
  /** Each durable consumes `count` messages, acking each; resolves when the last ack is done. */
  consume(count: number): Promise<void>
}

export interface KvSession extends AsyncDisposable {
  reset(): Promise<void>
  put(key: string, value: Buffer): Promise<unknown>
  get(key: string): Promise<unknown>
  /** Reads the revision it needs beforehand: only the write is the operation. Resolves to the new revision. */
  cas(key: string, value: Buffer, revision: number | null): Promise<number>
}

export interface RequestSession extends AsyncDisposable {
  /** One round trip with a responder of the same process (on connections of its own). */
  request(payload: Buffer): Promise<unknown>
}

import type { JetStreamClient, JetStreamManager } from '@nats-io/jetstream'
import type { NatsConnection } from '@nats-io/transport-node'
import { BusError } from '../core/index.ts'
import { type Bell, Ear, type Interest } from '../runtime/bell.ts'
import type { Clock } from '../runtime/clock.ts'
import type { ServerClock } from './server-clock.ts'

/** What the four interfaces of one bus share. */
export interface Context {
  readonly nc: NatsConnection
  readonly js: JetStreamClient
  readonly jsm: JetStreamManager
  /** Waits a second for an answer. */
  readonly quick: JetStreamManager
  readonly names: Names
  readonly clock: Clock
  readonly serverClock: ServerClock
  readonly bell: Bell
  readonly maxPayloadBytes: number
  readonly jobAckWaitMs: number
  /** Whether its keys are kept by several servers. */
  readonly isReplicated: boolean
  isClosed(): boolean
  /** @throws closed */
  checkOpen(): void
  /** Asks the server; whatever it rejects with is a BusError, `closed` when the bus is or closes meanwhile. */
  ask<T>(run: () => Promise<T>): Promise<T>
  /** Calls back after every reconnect, and when the bus ends or at once when it has ended, until the signal aborts: what was asked of the server before it is forgotten. */
  onReconnect(callback: () => void, signal: AbortSignal): void
}

/** The streams and subjects of a bus. The two subject spaces of messages and requests never meet: a stream answers what it captures. */
export class Names {
  readonly prefix: string
  readonly messages: string
  readonly work: string
  readonly kv: string
  readonly leases: string
  readonly durables: string
  readonly jobs: string

  constructor(prefix: string) {
    this.prefix = prefix
    this.messages = `${prefix}_messages`
    this.work = `${prefix}_work`
    this.kv = `${prefix}_kv`
    this.leases = `${prefix}_leases`
    this.durables = `${prefix}_durables`
    this.jobs = `${prefix}_jobs`
  }

  message(subject: string): string {
    return `${this.prefix}.msg.${subject}`
  }

  /** The subject of the bus's that a NATS subject of the messages stands for. */
  subjectOf(natsSubject: string): string {
    return natsSubject.slice(this.prefix.length + '.msg.'.length)
  }

  request(subject: string): string {
    return `${this.prefix}.req.${subject}`
  }

  requestSubjectOf(natsSubject: string): string {
    return natsSubject.slice(this.prefix.length + '.req.'.length)
  }

  ticket(queueToken: string): string {
    return `${this.prefix}.work.${queueToken}`
  }
}

/** An ear whose closing also ends what it stands for on the server. */
export class PullEar extends Ear {
  readonly #ended = new AbortController()

  constructor(bell: Bell, interest: readonly Interest[] = []) {
    super(bell, interest)
  }

  get ended(): AbortSignal {
    return this.#ended.signal
  }

  override close(): void {
    super.close()
    this.#ended.abort()
  }
}

/** The server wakes who waits; polling only guards against what went wrong unseen. */
export const POLL_INTERVAL_MS = 5_000
/** How long the server may take for an answer. */
export const ANSWER_WITHIN_MS = 5_000

/** @throws unsupported */
export function checkTx(tx: unknown): void {
  if (tx === undefined) return
  throw new BusError('unsupported', 'tx: NATS has no transactions with your database; PostgresBus takes the transaction of the caller')
}

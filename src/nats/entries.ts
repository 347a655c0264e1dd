/**
 * A KV bucket of NATS, as far as the bus needs it: reads by the leader, writes by compare-and-set, lists and watches. A tombstone
 * has a sequence of its own, which callers never see: an update that expected it would succeed.
 *
 * A replicated stream compares when a write is proposed, and no more when it is stored: of several that expect the same revision and come while
 * the first is on its way to the followers all would succeed (nats-server #4320). What it does look at when it stores is the id of a message.
 * So each write that expects a revision has an id made of the key and that revision, and the second one is a duplicate. One that expects none
 * could come in between: where a bucket is replicated and others compare, it must expect one, too.
 */

import { AckPolicy, DeliverPolicy } from '@nats-io/jetstream'
import { Kvm } from '@nats-io/kv'
import { type MsgHdrs, headers as newHeaders } from '@nats-io/transport-node'
import { BusError } from '../core/index.ts'
import type { Context } from './context.ts'
import { infoOf } from './deliveries.ts'
import { isDuplicateUnderWay, isNotThere, isWrongSequence, patiently } from './errors.ts'
import { pull } from './pull.ts'
import { headersOf, ownId, plain } from './wire.ts'

export interface StoredEntry {
  /** As in the bucket. */
  readonly key: string
  readonly value: Uint8Array
  readonly headers: MsgHdrs | undefined
  readonly revision: number
  /** By the server's clock, in ms since 1970. */
  readonly storedAt: number
  readonly deleted: boolean
  /** By the server's clock; `undefined`: never. */
  readonly expiresAt: number | undefined
  /** Of the value, also where only headers were asked for. */
  readonly bytes: number
  /** Whether it has expired, as of when it was read. */
  readonly expired: boolean
}

const OPERATION = 'KV-Operation'
/** Servers before 2.11 know no expiry of a key: the entry carries it and is absent to whoever reads it later. */
const TTL = 'klieo-ttl-ms'
const EXPECTED = 'Nats-Expected-Last-Subject-Sequence'
const BATCH = 500
/** An ephemeral consumer whose reader died goes by itself. */
const INACTIVE_MS = 60_000

export function absent(entry: StoredEntry): boolean {
  return entry.deleted || entry.expired
}

export class Entries {
  readonly #context: Context
  readonly bucket: string
  readonly stream: string

  constructor(context: Context, bucket: string) {
    this.#context = context
    this.bucket = bucket
    this.stream = `KV_${bucket}`
  }

  /**
   * @param history revisions kept per key
   * @returns whether several servers keep it
   */
  static async make(context: Pick<Context, 'js'>, bucket: string, history: number, replicas: number): Promise<boolean> {
    const status = await patiently(async () => (await new Kvm(context.js).create(bucket, { history, replicas })).status())
    return status.replicas > 1
  }

  subject(key: string): string {
    return `$KV.${this.bucket}.${key}`
  }

  async read(key: string): Promise<StoredEntry | null> {
    const found = await this.#context.ask(() => this.#context.jsm.streams.getMessage(this.stream, { last_by_subj: this.subject(key) }))
    return found && this.entry(found.subject, headersOf(found), found.data, found.seq, found.time.getTime())
  }

  /**
   * @param expected the revision it must be at; 0: never written; `undefined`: whatever
   * @returns the revision, or `null` when it is at another one
   */
  async write(
    key: string,
    value: Uint8Array,
    expected: number | undefined,
    ttlMs?: number,
    headers = newHeaders(),
  ): Promise<number | null> {
    if (ttlMs !== undefined) headers.set(TTL, String(ttlMs))
    return this.#publish(key, value, expected, headers)
  }

  /** Whatever is there. Compares all the same where a write without an expectation could come between others that compare. */
  async put(key: string, value: Uint8Array, ttlMs?: number): Promise<number> {
    for (;;) {
      const expected = this.#context.isReplicated ? ((await this.read(key))?.revision ?? 0) : undefined
      const revision = await this.write(key, value, expected, ttlMs)
      if (revision !== null) return revision
    }
  }

  /** Leaves a tombstone. @returns whether it was at that revision */
  async remove(key: string, expected: number | undefined): Promise<boolean> {
    const headers = newHeaders()
    headers.set(OPERATION, 'DEL')
    return (await this.#publish(key, new Uint8Array(0), expected, headers)) !== null
  }

  /**
   * Whether there has never been anything, or no trace of it is left, by the word of most servers: a leader that was replaced and does not know it
   * yet may read so, but not write.
   */
  async isBare(key: string): Promise<boolean> {
    const headers = newHeaders()
    headers.set(OPERATION, 'DEL')
    headers.set(EXPECTED, '0')
    const revision = await this.#store(key, new Uint8Array(0), headers)
    // Whoever asked before may have died before this.
    const left = revision === null ? await this.read(key) : null
    if (revision === null && !left?.deleted) return false
    await this.erase(revision ?? (left as StoredEntry).revision)
    return true
  }

  /** Removes a revision without a trace. */
  async erase(revision: number): Promise<void> {
    await this.#context.ask(async () => {
      try {
        await this.#context.jsm.streams.deleteMessage(this.stream, revision, false)
      } catch (error) {
        if (!isNotThere(error)) throw error
      }
    })
  }

  /** The last revision of every key that matches, tombstones included, in the order of revisions. */
  async all(filter: string, headersOnly = false): Promise<StoredEntry[]> {
    const { jsm } = this.#context
    const info = await this.#context.ask(() =>
      jsm.consumers.add(this.stream, {
        ack_policy: AckPolicy.None,
        deliver_policy: DeliverPolicy.LastPerSubject,
        filter_subject: this.subject(filter),
        inactive_threshold: INACTIVE_MS * 1e6,
        mem_storage: true,
        num_replicas: 1,
        headers_only: headersOnly,
      }),
    )
    // What is written meanwhile comes again.
    const found = new Map<string, StoredEntry>()
    try {
      for (;;) {
        const { messages, how } = await pull(this.#context, this.stream, info.name, { batch: BATCH, waitMs: 0, signal: NEVER })
        if (how !== 'answered') {
          this.#context.checkOpen()
          throw new BusError('connection', 'NATS did not answer in time; try again', { retryable: true })
        }
        for (const msg of messages) {
          const { seq, time } = infoOf(msg)
          const entry = this.entry(msg.subject, headersOf(msg), msg.data, seq, time)
          found.delete(entry.key)
          found.set(entry.key, entry)
        }
        if (messages.length < BATCH) return [...found.values()]
      }
    } finally {
      jsm.consumers.delete(this.stream, info.name).catch(() => {})
    }
  }

  entry(subject: string, headers: MsgHdrs | undefined, value: Uint8Array, revision: number, storedAt: number): StoredEntry {
    const operation = headers?.get(OPERATION)
    const ttl = headers?.get(TTL)
    const size = headers?.get('Nats-Msg-Size')
    const expiresAt = ttl ? storedAt + Number(ttl) : undefined
    return {
      key: subject.slice(this.subject('').length),
      value: plain(value),
      headers,
      revision,
      storedAt,
      deleted: operation === 'DEL' || operation === 'PURGE',
      expiresAt,
      bytes: size ? Number(size) : value.byteLength,
      expired: expiresAt !== undefined && expiresAt <= this.#context.serverClock.now(),
    }
  }

  async #publish(key: string, value: Uint8Array, expected: number | undefined, headers: MsgHdrs): Promise<number | null> {
    if (expected === undefined) return this.#store(key, value, headers)
    headers.set(EXPECTED, String(expected))
    return this.#store(key, value, headers, ownId('cas', key, expected))
  }

  async #store(key: string, value: Uint8Array, headers: MsgHdrs, msgID?: string): Promise<number | null> {
    return this.#context.ask(async () => {
      try {
        const id = msgID === undefined ? {} : { msgID }
        const { seq, duplicate } = await this.#context.js.publish(this.subject(key), value, { headers, ...id })
        return duplicate ? null : seq
      } catch (error) {
        if (isWrongSequence(error) || isDuplicateUnderWay(error)) return null
        throw error
      }
    })
  }
}

const NEVER = new AbortController().signal

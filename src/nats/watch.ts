/**
 * The server's side of a watch: a consumer that lives as long as it is read. Nothing is acknowledged, so what was on its
 * way when a connection broke is lost to the consumer: a gap in its numbers, or its silence, makes a new one that begins
 * after the last change that was read.
 */

import { AckPolicy, DeliverPolicy } from '@nats-io/jetstream'
import type { KvChange } from '../core/index.ts'
import type { ChangeSource } from '../runtime/watch.ts'
import type { Context } from './context.ts'
import { infoOf } from './deliveries.ts'
import type { Entries, StoredEntry } from './entries.ts'
import { LONG_TRANSIT_MS, pull } from './pull.ts'
import { headersOf } from './wire.ts'

const BATCH = 250
const PULL_MS = 20_000
const INACTIVE_MS = 60_000

/** What an entry is to the watch; `undefined`: nothing. */
type Change = (entry: StoredEntry) => KvChange | undefined

export class WatchSource implements ChangeSource {
  readonly #context: Context
  readonly #entries: Entries
  readonly #filter: string
  readonly #signal: AbortSignal
  readonly #change: Change
  #consumer = ''
  /** Its numbers have no gap. */
  #consumerSeq = 0
  /** Of the last change that was read. */
  #seq = 0
  /** What is not later was there when the watch began: its tombstones are not told. */
  #presentUpTo = 0

  private constructor(context: Context, entries: Entries, filter: string, signal: AbortSignal, change: Change) {
    this.#context = context
    this.#entries = entries
    this.#filter = filter
    this.#signal = signal
    this.#change = change
  }

  static async open(
    context: Context,
    entries: Entries,
    filter: string,
    updatesOnly: boolean,
    signal: AbortSignal,
    change: Change,
  ): Promise<WatchSource> {
    const source = new WatchSource(context, entries, filter, signal, change)
    const info = await context.ask(() => context.jsm.streams.info(entries.stream))
    const last = info.state.last_seq
    source.#presentUpTo = last
    if (updatesOnly) source.#seq = last
    await source.#begin(updatesOnly ? startingAfter(last) : { deliver_policy: DeliverPolicy.LastPerSubject })
    return source
  }

  async read(): Promise<readonly KvChange[]> {
    this.#context.checkOpen()
    for (const waitMs of [0, PULL_MS]) {
      // What waits gets the first change at once; what there is to read comes in batches.
      const batch = waitMs === 0 ? BATCH : 1
      const { messages, how } = await pull(this.#context, this.#entries.stream, this.#consumer, {
        batch,
        waitMs,
        signal: this.#signal,
        transitMs: LONG_TRANSIT_MS,
      })
      const changes: KvChange[] = []
      for (const msg of messages) {
        const { seq, consumerSeq, time } = infoOf(msg)
        if (consumerSeq !== this.#consumerSeq + 1) {
          await this.#beginAgain()
          return changes
        }
        this.#consumerSeq = consumerSeq
        this.#seq = seq
        const entry = this.#entries.entry(msg.subject, headersOf(msg), msg.data, seq, time)
        if (seq <= this.#presentUpTo && (entry.deleted || entry.expired)) continue
        const change = this.#change(entry)
        if (change) changes.push(change)
      }
      // The entries that were there are read: from here on every change counts, also those of keys that had none.
      if (waitMs === 0 && how === 'answered' && messages.length < batch) this.#seq = Math.max(this.#seq, this.#presentUpTo)
      if (changes.length > 0) return changes
      if (this.#signal.aborted) return []
      if (how !== 'answered') {
        await this.#beginAgain()
        return []
      }
    }
    return []
  }

  close(): void {
    this.#forget()
  }

  async #beginAgain(): Promise<void> {
    this.#context.checkOpen()
    this.#forget()
    if (this.#seq === 0) return this.#begin({ deliver_policy: DeliverPolicy.LastPerSubject })
    // From here on older revisions of what was there may come, too, and so must its end.
    this.#presentUpTo = 0
    await this.#begin(startingAfter(this.#seq))
  }

  async #begin(start: { readonly deliver_policy: DeliverPolicy; readonly opt_start_seq?: number }): Promise<void> {
    const { name } = await this.#context.ask(() =>
      this.#context.jsm.consumers.add(this.#entries.stream, {
        ack_policy: AckPolicy.None,
        filter_subject: this.#entries.subject(this.#filter),
        inactive_threshold: INACTIVE_MS * 1e6,
        mem_storage: true,
        num_replicas: 1,
        ...start,
      }),
    )
    this.#consumer = name
    this.#consumerSeq = 0
  }

  #forget(): void {
    const { jsm, isClosed } = this.#context
    if (!isClosed()) jsm.consumers.delete(this.#entries.stream, this.#consumer).catch(() => {})
  }
}

function startingAfter(seq: number): { readonly deliver_policy: DeliverPolicy; readonly opt_start_seq: number } {
  return { deliver_policy: DeliverPolicy.StartSequence, opt_start_seq: seq + 1 }
}

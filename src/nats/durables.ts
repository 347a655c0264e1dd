/**
 * What is known of the durables: one entry each in a bucket of the bus's, from which its consumer can be made at any time.
 * JetStream itself would change the filter of a consumer that exists when it is created once more, without a word (P11);
 * the entry is written by compare-and-set, so of two that create a durable at once one wins, and the other compares.
 *
 *   create   the entry, then the consumer. Died in between: the next subscription makes it.
 *   seek     the entry names another consumer, then that one, then the old one goes. Died in between: likewise; members that still read the old
 *            consumer look at the entry from time to time, move, and take it away. Without any it only stands in the lists of NATS's own tools.
 *   delete   the entry is marked as ending, from when on nobody joins it or makes its consumer; then the consumer goes, then the entry. Died in between:
 *            the next delete or subscription ends it.
 */

import { AckPolicy, type ConsumerInfo, DeliverPolicy } from '@nats-io/jetstream'
import { BusError, type CheckedSubscription, noSuchDurable } from '../core/index.ts'
import { consumerInfo, makeConsumer } from './consumers.ts'
import type { Context } from './context.ts'
import { absent, type Entries } from './entries.ts'
import { isNotThere } from './errors.ts'

export interface Durable {
  readonly durable: string
  readonly filter: string
  /** Differs from that of a durable of the same name that was deleted. */
  readonly id: string
  readonly consumer: string
  readonly start: Start
  readonly ackWaitMs: number
  readonly maxAckPending: number
  /** It is being deleted. */
  readonly ending?: true
}

type Start = 'all' | 'new' | { readonly seq: number } | { readonly time: number }

export class Durables {
  readonly #context: Context
  readonly #entries: Entries

  constructor(context: Context, entries: Entries) {
    this.#context = context
    this.#entries = entries
  }

  async find(durable: string): Promise<Durable | null> {
    const value = (await this.#read(durable))?.value
    return value && !value.ending ? value : null
  }

  /** Joins or creates it. @throws conflict when it has another filter */
  async join(durable: string, filter: string, wanted: CheckedSubscription): Promise<Durable> {
    for (;;) {
      const found = await this.#read(durable)
      if (found?.value.ending) {
        await this.#end(found)
        continue
      }
      if (found) {
        if (found.value.filter !== filter) {
          throw new BusError(
            'conflict',
            `durable "${durable}" exists with the filter "${found.value.filter}"; subscribe with that one, or delete the durable first`,
          )
        }
        if (!(await this.ensure(found.value))) continue
        return found.value
      }
      const made: Durable = {
        durable,
        filter,
        id: token(),
        consumer: `${durable}-${token()}`,
        start: plainStart(wanted.start),
        ackWaitMs: wanted.ackWaitMs,
        maxAckPending: wanted.maxAckPending,
      }
      if ((await this.#write(made, null)) !== null && (await this.ensure(made))) return made
    }
  }

  /** Makes its consumer if there is none. @returns false when the durable was moved or deleted meanwhile, and it has none again */
  async ensure(durable: Durable): Promise<boolean> {
    const { names } = this.#context
    if (await this.info(durable)) return true
    await makeConsumer(this.#context, names.messages, {
      durable_name: durable.consumer,
      description: `durable ${durable.durable} of klieo-bus`,
      ack_policy: AckPolicy.Explicit,
      filter_subject: names.message(durable.filter),
      ack_wait: durable.ackWaitMs * 1e6,
      // Dead letters are the bus's own work (P6): JetStream would leave the message in limbo.
      max_deliver: -1,
      max_ack_pending: durable.maxAckPending,
      max_waiting: 8_192,
      ...startConfig(durable.start),
    })
    if ((await this.find(durable.durable))?.consumer === durable.consumer) return true
    await this.deleteConsumer(durable.consumer)
    return false
  }

  /** @throws not_found */
  async seek(durable: string, start: CheckedSubscription['start']): Promise<void> {
    for (;;) {
      const found = await this.#read(durable)
      if (!found || found.value.ending) throw noSuchDurable(durable)
      const moved = { ...found.value, consumer: `${durable}-${token()}`, start: plainStart(start) }
      if ((await this.#write(moved, found.revision)) === null) continue
      await this.ensure(moved)
      await this.deleteConsumer(found.value.consumer)
      return
    }
  }

  /** @throws not_found */
  async delete(durable: string): Promise<void> {
    for (;;) {
      const found = await this.#read(durable)
      if (!found) throw noSuchDurable(durable)
      const { value } = found
      // Its members hear of the end of the consumer and ask after the durable at once: by then it must be none any more.
      const revision = value.ending ? found.revision : await this.#write({ ...value, ending: true }, found.revision)
      if (revision === null) continue
      if (await this.#end({ value, revision })) return
      throw noSuchDurable(durable)
    }
  }

  async all(): Promise<Durable[]> {
    const entries = await this.#entries.all('>')
    const durables = entries.filter((entry) => !absent(entry)).map((entry) => JSON.parse(new TextDecoder().decode(entry.value)) as Durable)
    return durables.filter(({ ending }) => !ending)
  }

  info(durable: Durable): Promise<ConsumerInfo | null> {
    return consumerInfo(this.#context, this.#context.names.messages, durable.consumer)
  }

  /** What its consumer says, made where it is not there yet: without it nobody knows what waits. @returns `null` when there is no such durable any more */
  async infoOf(durable: Durable): Promise<ConsumerInfo | null> {
    for (let one: Durable | null = durable; one; ) {
      const info = await this.info(one)
      if (info) return info
      if (!(await this.ensure(one))) one = await this.find(one.durable)
    }
    return null
  }

  /** One that is marked as ending. @returns false when somebody else has done it */
  async #end({ value, revision }: { readonly value: Durable; readonly revision: number }): Promise<boolean> {
    await this.deleteConsumer(value.consumer)
    return this.#entries.remove(value.durable, revision)
  }

  /** One that no durable has any more. */
  async deleteConsumer(consumer: string): Promise<void> {
    const { jsm, names } = this.#context
    await this.#context.ask(async () => {
      try {
        await jsm.consumers.delete(names.messages, consumer)
      } catch (error) {
        if (!isNotThere(error)) throw error
      }
    })
  }

  async #read(durable: string): Promise<{ readonly value: Durable; readonly revision: number } | null> {
    const entry = await this.#entries.read(durable)
    if (!entry || absent(entry)) return null
    return { value: JSON.parse(new TextDecoder().decode(entry.value)) as Durable, revision: entry.revision }
  }

  /** @param expected `null`: there must be none. @returns the revision, or `null` when it was another one */
  async #write(durable: Durable, expected: number | null): Promise<number | null> {
    const { durable: name } = durable
    const last = expected === null ? await this.#entries.read(name) : null
    if (last && !absent(last)) return null
    const value = new TextEncoder().encode(JSON.stringify(durable))
    return this.#entries.write(name, value, expected ?? last?.revision ?? 0)
  }
}

/** Whether a durable that begins there takes the message: JetStream clips a start that is still to come to what is next. */
export function isBeforeStart(start: Start, seq: number, time: number): boolean {
  if (typeof start === 'string') return false
  return 'seq' in start ? seq < start.seq : time < start.time
}

function plainStart(start: CheckedSubscription['start']): Start {
  return typeof start === 'object' && 'time' in start ? { time: start.time.getTime() } : start
}

function startConfig(start: Start) {
  if (start === 'new') return { deliver_policy: DeliverPolicy.New }
  if (start === 'all') return { deliver_policy: DeliverPolicy.All }
  if ('seq' in start) return { deliver_policy: DeliverPolicy.StartSequence, opt_start_seq: Math.max(1, start.seq) }
  return { deliver_policy: DeliverPolicy.StartTime, opt_start_time: new Date(Math.max(0, start.time)).toISOString() }
}

function token(): string {
  return crypto.randomUUID().slice(0, 8)
}

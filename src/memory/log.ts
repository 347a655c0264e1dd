/**
 * The messages, and for each durable its place among them and what it has handed out. The counterpart of a server: every
 * method runs to its end in one go, so each is a transaction.
 *
 * A delivery of a durable is, in turn,
 *   handed out   it has a token, and a time at which it may be handed out again
 *   waiting      naked or handed back: no token, so that nothing its earlier holder does has an effect
 * and goes away when it is acked, or buried after the last delivery that `maxDeliver` allows.
 */

import {
  BusError,
  type CheckedMessage,
  type CheckedSubscription,
  DUPLICATE_WINDOW_MS,
  type DurableInfo,
  type Headers,
  matches,
  noSuchDurable,
  type PubAck,
} from '../core/index.ts'
import type { Bell } from '../runtime/bell.ts'
import type { Clock } from '../runtime/clock.ts'
import type { Delivery, Fetched } from '../runtime/stream.ts'
import { type Alarm, type Alarms, alarm } from './alarms.ts'
import { Heap, type Slotted } from './heap.ts'

interface StoredMessage {
  readonly seq: number
  readonly subject: string
  readonly payload: Uint8Array
  readonly headers: Headers
  readonly publishedAt: number
  /** Durables that have it handed out or waiting: it is not removed. */
  unsettled: number
  /** Whoever holds it may settle it; nobody gets it again. */
  purged: boolean
}

interface Unsettled extends Slotted {
  readonly message: StoredMessage
  attempt: number
  /** 0: nobody's. */
  token: number
  visibleAt: number
  /** Grows with each time that `visibleAt` is set: of those of one moment the earlier set goes first, as by a server's finer clock. */
  order: number
  /** No delivery may follow this one. */
  final: boolean
  /** Set while `final`. */
  readonly alarm: Alarm
}

export interface Durable {
  readonly name: string
  readonly filter: string
  startSeq: number
  startTime: number
  lastActiveAt: number
  /** An index: what is before it was handed out, or passed over. */
  next: number
  readonly unsettled: Heap<Unsettled>
  deleted: boolean
}

export interface MemoryDelivery extends Delivery {
  readonly durable: Durable
  readonly unsettled: Unsettled
  readonly token: number
}

/** Retention is looked at once in so many messages, and whenever a durable is made. */
const PRUNE_EVERY = 1_024

export class Log {
  readonly #clock: Clock
  readonly #bell: Bell
  readonly #alarms: Alarms
  #messages: StoredMessage[] = []
  readonly #durables = new Map<string, Durable>()
  /** In the order in which they expire. */
  readonly #ids = new Map<string, { seq: number; expiresAt: number }>()
  #lastSeq = 0
  #lastToken = 0
  #lastOrder = 0
  #untilPrune = PRUNE_EVERY

  constructor(clock: Clock, bell: Bell, alarms: Alarms) {
    this.#clock = clock
    this.#bell = bell
    this.#alarms = alarms
  }

  publish(messages: readonly CheckedMessage[], retentionMs: number): PubAck[] {
    const subjects = new Set<string>()
    const acks = messages.map((message): PubAck => {
      const first = message.msgId === undefined ? undefined : this.#known(message.msgId)
      if (first !== undefined) return { seq: first, duplicate: true }
      const seq = this.#append(message.subject, message.payload, message.headers)
      if (message.msgId !== undefined) this.#ids.set(message.msgId, { seq, expiresAt: this.#clock.now() + DUPLICATE_WINDOW_MS })
      subjects.add(message.subject)
      return { seq, duplicate: false }
    })
    this.#untilPrune -= messages.length
    if (this.#untilPrune <= 0) this.prune(retentionMs)
    this.#bell.ring([...subjects].map((name) => ({ kind: 'message', name })))
    return acks
  }

  /** A dead letter. */
  publishLetter(subject: string, payload: Uint8Array, headers: Headers): void {
    this.#append(subject, payload, headers)
    this.#bell.ring([{ kind: 'message', name: subject }])
  }

  /** @throws conflict when it exists with another filter */
  durable(name: string, filter: string, start: CheckedSubscription['start'], retentionMs: number): Durable {
    const known = this.#durables.get(name)
    if (known?.filter === filter) return known
    if (known) {
      throw new BusError(
        'conflict',
        `durable "${name}" exists with the filter "${known.filter}", not "${filter}"; use another name, or delete it and lose its position`,
      )
    }
    this.prune(retentionMs)
    const durable: Durable = {
      name,
      filter,
      ...this.#positionOf(start),
      lastActiveAt: this.#clock.date().getTime(),
      unsettled: new Heap((a, b) => a.visibleAt < b.visibleAt || (a.visibleAt === b.visibleAt && a.order < b.order)),
      deleted: false,
    }
    this.#durables.set(name, durable)
    return durable
  }

  /** @throws not_found */
  deleteDurable(name: string): void {
    const durable = this.#existing(name)
    durable.deleted = true
    this.#durables.delete(name)
    this.#forget(durable)
    this.#bell.ring([{ kind: 'durable', name }])
  }

  /** @throws not_found */
  seek(name: string, start: CheckedSubscription['start']): void {
    const durable = this.#existing(name)
    this.#forget(durable)
    Object.assign(durable, this.#positionOf(start))
    this.#bell.ring([{ kind: 'durable', name }])
  }

  durables(): DurableInfo[] {
    const now = this.#clock.now()
    return [...this.#durables.values()].map((durable) => {
      const unsettled = durable.unsettled.items()
      const inFlight = unsettled.filter(({ token, visibleAt }) => token !== 0 && visibleAt > now).length
      return {
        durable: durable.name,
        filter: durable.filter,
        pending: this.#messages.slice(durable.next).filter((message) => isFor(durable, message)).length,
        inFlight,
        redelivering: unsettled.length - inFlight,
        lastActiveAt: new Date(durable.lastActiveAt),
      }
    })
  }

  /** Removes what is stored, delivered or not. @returns how many */
  purge(filter: string, before: Date | undefined): number {
    const end = before?.getTime() ?? Number.POSITIVE_INFINITY
    const gone = this.#messages.map(({ subject, publishedAt, purged }) => !purged && matches(filter, subject) && publishedAt < end)
    const count = gone.filter(Boolean).length
    if (count === 0) return 0
    for (const [index, message] of this.#messages.entries()) message.purged ||= gone[index] as boolean
    for (const durable of this.#durables.values()) {
      durable.next -= gone.slice(0, durable.next).filter(Boolean).length
      for (const one of durable.unsettled.items()) if (one.message.purged && one.token === 0) this.#end(durable, one)
    }
    this.#messages = this.#messages.filter((_, index) => !gone[index])
    return count
  }

  /**
   * Hands out what is due again, then what is new.
   * @throws not_found when the durable was deleted
   */
  fetch(durable: Durable, limit: number, subscription: CheckedSubscription): Fetched<MemoryDelivery> {
    if (durable.deleted) throw new BusError('not_found', 'the durable does not exist; it was deleted')
    const { unsettled } = durable
    const now = this.#clock.now()
    durable.lastActiveAt = this.#clock.date().getTime()
    const fetched: Unsettled[] = []
    for (let one = unsettled.peek(); one && one.visibleAt <= now && fetched.length < limit; one = unsettled.peek()) {
      if (one.message.purged) this.#end(durable, one)
      else if (one.final) this.#bury(durable, one)
      else {
        this.#handOut(durable, one, subscription)
        unsettled.moved(one)
        fetched.push(one)
      }
    }
    fetched.sort((a, b) => a.message.seq - b.message.seq)
    for (const one of fetched) {
      one.order = ++this.#lastOrder
      unsettled.moved(one)
    }

    // Redeliveries are exempt from maxAckPending, and yet they count.
    let room = Math.min(limit - fetched.length, subscription.maxAckPending - unsettled.size)
    while (room > 0 && durable.next < this.#messages.length) {
      const message = this.#messages[durable.next++] as StoredMessage
      if (!isFor(durable, message)) continue
      const one: Unsettled = {
        message,
        attempt: 0,
        token: 0,
        visibleAt: 0,
        order: 0,
        final: false,
        slot: -1,
        alarm: alarm(() => this.#bury(durable, one)),
      }
      message.unsettled++
      this.#handOut(durable, one, subscription)
      unsettled.push(one)
      fetched.push(one)
      room--
    }

    const next = unsettled.peek()
    return {
      deliveries: fetched.map((one) => toDelivery(durable, one)),
      more: false,
      dueInMs: next ? Math.max(0, next.visibleAt - now) : null,
    }
  }

  /** Each of these answers whether the delivery was still its holder's. */
  ack(delivery: MemoryDelivery): boolean {
    const one = holding(delivery)
    if (!one) return false
    this.#end(delivery.durable, one)
    // Somebody may wait for room in maxAckPending.
    this.#bell.ring([{ kind: 'durable', name: delivery.durable.name }])
    return true
  }

  nak(delivery: MemoryDelivery, delayMs: number): boolean {
    const one = holding(delivery)
    if (!one) return false
    if (one.final) this.#bury(delivery.durable, one)
    else this.#giveBack(delivery.durable, one, this.#clock.now() + delayMs)
    this.#bell.ring([{ kind: 'durable', name: delivery.durable.name }])
    return true
  }

  extend(delivery: MemoryDelivery, ackWaitMs: number): boolean {
    const one = holding(delivery)
    if (!one) return false
    const visibleAt = this.#clock.now() + ackWaitMs
    if (visibleAt >= one.visibleAt) one.order = ++this.#lastOrder
    one.visibleAt = Math.max(one.visibleAt, visibleAt)
    delivery.durable.unsettled.moved(one)
    if (one.final) this.#alarms.set(one.alarm, one.visibleAt)
    return true
  }

  /** Hands back what was not yielded: the attempt is not counted. */
  release(deliveries: readonly MemoryDelivery[]): void {
    for (const delivery of deliveries.toSorted((a, b) => a.seq - b.seq)) {
      const one = holding(delivery)
      if (!one) continue
      one.attempt--
      this.#giveBack(delivery.durable, one, this.#clock.now())
      this.#bell.ring([{ kind: 'durable', name: delivery.durable.name }])
    }
  }

  /** Removes what is older than that and behind every durable (P13). */
  prune(retentionMs: number): void {
    this.#untilPrune = PRUNE_EVERY
    const before = this.#clock.date().getTime() - retentionMs
    let end = this.#messages.length
    for (const { next } of this.#durables.values()) end = Math.min(end, next)
    const old = this.#messages.findIndex(({ publishedAt }, index) => index >= end || publishedAt >= before)
    const count = old === -1 ? end : old
    if (count === 0) return
    const kept = this.#messages.slice(0, count).filter(({ unsettled }) => unsettled > 0)
    this.#messages = kept.concat(this.#messages.slice(count))
    for (const durable of this.#durables.values()) durable.next -= count - kept.length
  }

  #append(subject: string, payload: Uint8Array, headers: Headers): number {
    this.#messages.push({
      seq: ++this.#lastSeq,
      subject,
      payload,
      headers,
      publishedAt: this.#clock.date().getTime(),
      unsettled: 0,
      purged: false,
    })
    return this.#lastSeq
  }

  #existing(name: string): Durable {
    const durable = this.#durables.get(name)
    if (!durable) throw noSuchDurable(name)
    return durable
  }

  #positionOf(start: CheckedSubscription['start']): Pick<Durable, 'startSeq' | 'startTime' | 'next'> {
    return {
      startSeq: typeof start === 'object' && 'seq' in start ? start.seq : 0,
      startTime: typeof start === 'object' && 'time' in start ? start.time.getTime() : Number.NEGATIVE_INFINITY,
      next: start === 'new' ? this.#messages.length : 0,
    }
  }

  /** What its members hold is not theirs any more. */
  #forget(durable: Durable): void {
    for (let one = durable.unsettled.peek(); one; one = durable.unsettled.peek()) this.#end(durable, one)
  }

  #known(msgId: string): number | undefined {
    const now = this.#clock.now()
    for (const [id, { expiresAt }] of this.#ids) {
      if (expiresAt > now) break
      this.#ids.delete(id)
    }
    return this.#ids.get(msgId)?.seq
  }

  #handOut(durable: Durable, one: Unsettled, { ackWaitMs, maxDeliver }: CheckedSubscription): void {
    one.attempt++
    one.token = ++this.#lastToken
    one.visibleAt = this.#clock.now() + ackWaitMs
    one.order = ++this.#lastOrder
    one.final = maxDeliver !== null && one.attempt >= maxDeliver
    if (one.final && !durable.deleted) this.#alarms.set(one.alarm, one.visibleAt)
  }

  #giveBack(durable: Durable, one: Unsettled, visibleAt: number): void {
    one.token = 0
    one.final = false
    one.visibleAt = visibleAt
    one.order = ++this.#lastOrder
    this.#alarms.clear(one.alarm)
    durable.unsettled.moved(one)
  }

  #end(durable: Durable, one: Unsettled): void {
    one.token = 0
    one.message.unsettled--
    this.#alarms.clear(one.alarm)
    durable.unsettled.remove(one)
  }

  #bury(durable: Durable, one: Unsettled): void {
    const { message, attempt } = one
    this.#end(durable, one)
    if (message.purged) return
    this.publishLetter(
      `${durable.name}.dlq`,
      message.payload,
      Object.freeze({
        ...message.headers,
        dlq_reason: 'max_deliver_exceeded',
        dlq_subject: message.subject,
        dlq_seq: String(message.seq),
        dlq_attempts: String(attempt),
      }),
    )
    // It made room in maxAckPending.
    this.#bell.ring([{ kind: 'durable', name: durable.name }])
  }
}

function isFor({ startSeq, startTime, filter }: Durable, { seq, publishedAt, subject }: StoredMessage): boolean {
  return seq >= startSeq && publishedAt >= startTime && matches(filter, subject)
}

function holding({ unsettled, token }: MemoryDelivery): Unsettled | undefined {
  return unsettled.token === token ? unsettled : undefined
}

/** The holder may do with the bytes what he likes. */
function toDelivery(durable: Durable, unsettled: Unsettled): MemoryDelivery {
  const { seq, subject, payload, headers, publishedAt } = unsettled.message
  return {
    durable,
    unsettled,
    token: unsettled.token,
    seq,
    subject,
    payload: payload.slice(),
    headers,
    attempt: unsettled.attempt,
    publishedAt: new Date(publishedAt),
  }
}

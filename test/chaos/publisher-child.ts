/**
 * Publishes and enqueues: plainly, many at once, with ids that come again, in transactions that commit, roll back, use
 * savepoints, commit late or are prepared and left to somebody else.
 */

import type { Dice } from './dice.ts'
import { Member } from './member.ts'
import { type Call, now } from './record.ts'
import { resolveOne, Transaction, withClient } from './transaction.ts'
import { MAX_ATTEMPTS, QUEUES, SUBJECTS } from './world.ts'

const CLIENTS = 4
const EVERY_MS = 160
/** Well within the two minutes in which an id counts. */
const REPEATED_WITHIN_US = 40_000_000
/** Ids that all processes use: one of these a period. */
const PERIOD_US = 20_000_000
const MOST_LATE = 3
const LATE_MS = 5_000

const member = await Member.start()

/**
 * The order of what one publisher says on each subject. A publisher ends with the first publish whose fate it does not know,
 * and another one goes on, so that no order has holes that nobody can explain.
 */
class Orders {
  readonly publisher: string
  readonly #last = new Map<string, number>()
  readonly #open = new Map<string, Set<number>>()

  constructor(publisher: string) {
    this.publisher = publisher
  }

  /** All up to this one are over: published for good, or rolled back. */
  after(subject: string): number {
    return Math.min(this.#last.get(subject) ?? 0, ...[...(this.#open.get(subject) ?? [])].map((order) => order - 1))
  }

  take(subject: string): number {
    const order = (this.#last.get(subject) ?? 0) + 1
    this.#last.set(subject, order)
    if (!this.#open.has(subject)) this.#open.set(subject, new Set())
    this.#open.get(subject)!.add(order)
    return order
  }

  over(subject: string, order: number): void {
    this.#open.get(subject)!.delete(order)
  }
}

type Publish = Extract<Call, { do: 'publish' }>
type Enqueue = Extract<Call, { do: 'enqueue' }>

interface Repeated {
  readonly msgId: string
  readonly subject: string
  readonly since: number
}

class Publisher {
  readonly #name: string
  readonly #dice: Dice
  #generation = 0
  #orders: Orders
  #late = new Set<Promise<unknown>>()
  #repeated: Repeated[] = []
  #dedupKeys: { queue: string; key: string }[] = []

  constructor(name: string) {
    this.#name = name
    this.#dice = member.dice(name)
    this.#orders = new Orders(`${member.name}.${name}`)
  }

  async step(): Promise<void> {
    const kind = this.#dice.weighted({
      publish: 36,
      publishMany: 8,
      publishAgain: 12,
      transaction: 14,
      late: 4,
      prepared: 4,
      enqueue: 18,
      enqueueMany: 5,
      enqueueAgain: 8,
    })
    switch (kind) {
      case 'publish':
        return this.#publish([this.#message(this.#dice.pick(SUBJECTS))])
      case 'publishMany': {
        const subjects = Array.from({ length: this.#dice.between(2, 6) }, () => this.#dice.pick(SUBJECTS))
        return this.#publish(this.#messages(subjects))
      }
      case 'publishAgain': {
        const { subject, msgId } = this.#repeatable()
        return this.#publish([this.#message(subject, { msgId })])
      }
      case 'transaction':
        return this.#transaction('now')
      case 'late':
        return this.#late.size < MOST_LATE ? this.#transaction('late') : undefined
      case 'prepared':
        return this.#transaction('prepared')
      case 'enqueue':
        return this.#enqueue(this.#jobs(1))
      case 'enqueueMany':
        return this.#enqueue(this.#jobs(this.#dice.between(2, 5)))
      case 'enqueueAgain':
        return this.#enqueue([this.#again()])
    }
  }

  /** All that it left under way. */
  async settled(): Promise<void> {
    await Promise.all(this.#late)
  }

  /** Its fate is unknown: see {@link Orders}. */
  #unknown(orders: Orders): void {
    if (orders === this.#orders) this.#orders = new Orders(`${member.name}.${this.#name}#${++this.#generation}`)
  }

  /** @param orders those of when its transaction began: they may have ended meanwhile */
  #message(subject: string, more: { msgId?: string; tx?: string } = {}, orders = this.#orders, after = orders.after(subject)): Publish {
    const { publisher } = orders
    return { do: 'publish', id: member.id(), subject, publisher, order: orders.take(subject), after, ...more }
  }

  /** Of one call: none of them is before another by having resolved first. */
  #messages(subjects: readonly string[]): Publish[] {
    const after = new Map(subjects.map((subject) => [subject, this.#orders.after(subject)]))
    return subjects.map((subject) => this.#message(subject, {}, this.#orders, after.get(subject)))
  }

  async #publish(messages: readonly Publish[]): Promise<void> {
    const orders = this.#orders
    const { pubsub } = await member.bus()
    const [first] = messages as [Publish]
    try {
      if (messages.length === 1) {
        const options = first.msgId === undefined ? {} : { msgId: first.msgId }
        await member.call(
          first,
          () => pubsub.publish(first.subject, first.id, options),
          (ack) => ack,
        )
      } else {
        await member.callMany(
          messages,
          () => pubsub.publishMany(messages.map(({ subject, id }) => ({ subject, payload: id }))),
          (ack) => ack,
        )
      }
      for (const { subject, order } of messages) orders.over(subject, order)
    } catch (error) {
      this.#unknown(orders)
      throw error
    }
  }

  async #publishIn(transaction: Transaction, message: Publish): Promise<void> {
    const { pubsub } = await member.bus()
    const options = { tx: transaction.client, ...(message.msgId === undefined ? {} : { msgId: message.msgId }) }
    await member.call(
      message,
      () => pubsub.publish(message.subject, message.id, options),
      (ack) => ack,
    )
  }

  #jobs(count: number): Enqueue[] {
    const queue = this.#dice.pick(QUEUES)
    return Array.from({ length: count }, () => ({ do: 'enqueue', id: member.id(), queue, maxAttempts: MAX_ATTEMPTS[queue]! }))
  }

  /** A dedup key of its own, used before or not, or one that all processes use. */
  #again(): Enqueue {
    const shared = `shared-${Math.floor(now() / PERIOD_US)}-${this.#dice.between(0, 3)}`
    const queue = this.#dice.pick(QUEUES)
    const fresh = { queue, key: this.#dice.chance(0.3) ? shared : `${member.name}-${member.id()}` }
    const { key, ...known } = this.#dedupKeys.length > 0 && this.#dice.chance(0.5) ? this.#dice.pick(this.#dedupKeys) : fresh
    this.#dedupKeys = [...this.#dedupKeys, { ...known, key }].slice(-8)
    return { do: 'enqueue', id: member.id(), queue: known.queue, maxAttempts: MAX_ATTEMPTS[known.queue]!, dedupKey: key }
  }

  async #enqueue(calls: readonly Enqueue[], transaction?: Transaction): Promise<void> {
    const { jobs } = await member.bus()
    const options = transaction ? { tx: transaction.client } : {}
    const made = calls.map(({ id, maxAttempts, dedupKey }) => ({
      payload: id,
      maxAttempts,
      ...(dedupKey === undefined ? {} : { dedupKey }),
      ...(this.#dice.chance(0.15) ? { delayMs: this.#dice.between(0, 3_000) } : {}),
      ...(this.#dice.chance(0.2) ? { priority: this.#dice.between(-2, 2) } : {}),
    }))
    const { queue } = calls[0]!
    if (made.length === 1) {
      await member.call(
        calls[0]!,
        () => jobs.enqueue(queue, made[0]!, options),
        (job) => ({ job }),
      )
    } else {
      await member.callMany(
        calls,
        () => jobs.enqueueMany(queue, made, options),
        (job) => ({ job }),
      )
    }
  }

  #repeatable(): Repeated {
    const since = now()
    this.#repeated = this.#repeated.filter((other) => since - other.since < REPEATED_WITHIN_US).slice(-10)
    if (this.#repeated.length > 0 && this.#dice.chance(0.5)) return this.#dice.pick(this.#repeated)
    const period = Math.floor(since / PERIOD_US)
    const shared = this.#dice.chance(0.3)
    const fresh = shared
      ? { msgId: `shared-${period}-${this.#dice.between(0, 4)}`, subject: SUBJECTS[0]!, since: period * PERIOD_US }
      : { msgId: member.id(), subject: this.#dice.pick(SUBJECTS), since }
    this.#repeated.push(fresh)
    return fresh
  }

  async #transaction(end: 'now' | 'late' | 'prepared'): Promise<void> {
    const orders = this.#orders
    // Before its first statement: what resolved until here comes first.
    const after = new Map(SUBJECTS.map((subject) => [subject, orders.after(subject)]))
    const transaction = await Transaction.begin(member)
    const messages: Publish[] = []
    const publish = async (tx: string) => {
      const { subject, msgId } = this.#dice.chance(0.15) ? this.#repeatable() : { subject: this.#dice.pick(SUBJECTS), msgId: undefined }
      const message = this.#message(subject, { tx, ...(msgId === undefined ? {} : { msgId }) }, orders, after.get(subject))
      messages.push(message)
      await this.#publishIn(transaction, message)
    }
    const over = () => {
      for (const { subject, order } of messages) orders.over(subject, order)
    }
    try {
      await transaction.during(async () => {
        for (let left = this.#dice.between(1, 4); left > 0; left--) {
          if (this.#dice.chance(0.2)) {
            await transaction.savepoint(this.#dice.chance(0.5), publish)
          } else if (this.#dice.chance(0.3)) {
            const calls = this.#dice.chance(0.3) ? [this.#again()] : this.#jobs(this.#dice.between(1, 2))
            await this.#enqueue(
              calls.map((call) => ({ ...call, tx: transaction.name })),
              transaction,
            )
          } else await publish(transaction.name)
        }
        if (end === 'prepared') await transaction.prepare()
      })
    } catch (error) {
      this.#unknown(orders)
      throw error
    }
    if (end === 'prepared') return this.#unknown(orders)
    const finish = async () => {
      try {
        if (end === 'late') await member.pause(this.#dice.between(200, LATE_MS))
        if (this.#dice.chance(0.75)) await transaction.commit()
        else await transaction.rollback()
        over()
      } catch (error) {
        this.#unknown(orders)
        throw error
      }
    }
    if (end === 'now') return finish()
    const late = member.tolerated(finish())
    this.#late.add(late)
    void late.then(() => this.#late.delete(late))
  }
}

for (let n = 1; n <= CLIENTS; n++) {
  const publisher = new Publisher(`c${n}`)
  member.produces(
    EVERY_MS,
    () => publisher.step(),
    () => publisher.settled(),
  )
}

/** Ends what others have prepared. */
const resolver = member.dice('resolver')
member.takes(async () => {
  await member.pause(resolver.between(300, 2_000))
  await withClient(member.pool, (client) => resolveOne(member, client, resolver, resolver.between(0, 6_000)))
})

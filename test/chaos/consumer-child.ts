/**
 * Consumes: the members of the durables that are this process's. How a delivery is settled depends on the durable's manner;
 * some are settled too late, twice, in a transaction that is rolled back, or never.
 */

import type { Msg, PostgresTx } from '../../src/index.ts'
import type { Dice } from './dice.ts'
import { Member, text } from './member.ts'
import { type Call, now } from './record.ts'
import { Transaction } from './transaction.ts'
import { DURABLES, type Durable } from './world.ts'

type PgMsg = Msg<PostgresTx>

const IN_FLIGHT = 8
/** Until a durable comes into being that is not there from the beginning. */
const LATE_MS = 8_000

const MANNERS = {
  prompt: { ack: 96, again: 2, nak: 2 },
  careful: { ack: 90, again: 2, extend: 4, hold: 1, leave: 1, nak: 2 },
  rough: { ack: 50, again: 4, extend: 6, hold: 5, leave: 4, nak: 10, nakLater: 8, term: 4, transaction: 5, rolledBack: 4 },
  transactional: { ack: 10, transaction: 60, rolledBack: 15, lateTransaction: 5, leave: 2, hold: 2 },
  failing: { ack: 30, nak: 20, nakLater: 10, leave: 20, hold: 15, term: 3, rolledBack: 2 },
} as const

const member = await Member.start()
let streams = 0

class Consumer {
  readonly #durable: Durable
  readonly #dice: Dice

  constructor(durable: Durable, name: string) {
    this.#durable = durable
    this.#dice = member.dice(name)
  }

  async step(): Promise<void> {
    const { name, filter, ackWaitMs, maxDeliver, maxInFlight = IN_FLIGHT, late } = this.#durable
    if (late && streams === 0 && member.assignment.incarnation === 1) await member.hold(LATE_MS)
    const bus = await member.bus()
    const session = member.session
    const stream = await bus.pubsub.subscribe(filter, name, {
      ackWaitMs,
      maxInFlight,
      ...(maxDeliver === undefined ? {} : { maxDeliver }),
    })
    const id = `${session}/${++streams}`
    // Some go after a while and come back: what they fetched and did not yield goes to the others.
    let stays = this.#dice.chance(0.3) ? this.#dice.between(5, 60) : Number.POSITIVE_INFINITY
    let askedAt = now()
    for await (const message of stream) {
      this.#note(message, id, session, maxInFlight === 1 ? { handedOutAfter: askedAt } : {})
      void member.tolerated(this.#handle(message))
      if (--stays <= 0 && !member.gentle) break
      askedAt = now()
    }
    await member.call({ do: 'close', member: session, stream: id }, () => stream.close())
  }

  #note(
    { payload, subject, seq, attempt, headers }: PgMsg,
    stream: string,
    session: string,
    more: { readonly handedOutAfter?: number },
  ): void {
    const { name: durable, ackWaitMs } = this.#durable
    const dlq = Object.fromEntries(Object.entries(headers).filter(([header]) => header.startsWith('dlq_')))
    member.recorder.write({
      kind: 'delivered',
      at: now(),
      stream,
      member: session,
      durable,
      ackWaitMs,
      id: text(payload),
      subject,
      seq,
      attempt,
      ...(Object.keys(dlq).length > 0 ? { dlq } : {}),
      ...more,
    })
    member.delivered()
  }

  async #handle(message: PgMsg): Promise<void> {
    if (member.gentle) return this.#settle('ack', message)
    const { ackWaitMs, manner } = this.#durable
    const dice = this.#dice
    await member.pause(dice.between(0, 40))
    const how = dice.weighted(MANNERS[manner] as Partial<Record<HowToSettle, number>> as Record<HowToSettle, number>)
    switch (how) {
      case 'ack':
        return this.#settle('ack', message)
      case 'again':
        await this.#settle('ack', message)
        return this.#settle(dice.pick(['ack', 'nak', 'term', 'extend']), message)
      case 'nak':
      case 'term':
        return this.#settle(how, message)
      case 'nakLater':
        return this.#settle('nak', message, dice.between(1, 1_500))
      case 'extend':
        for (let times = dice.between(1, 4); times > 0; times--) {
          await member.hold(ackWaitMs * 0.6)
          await this.#settle('extend', message)
        }
        return this.#settle('ack', message)
      case 'hold':
        await member.hold(ackWaitMs * (0.9 + dice.between(0, 10) / 10))
        return this.#settle(dice.pick(['ack', 'nak', 'term', 'extend']), message)
      case 'leave':
        return
      case 'transaction':
      case 'lateTransaction':
      case 'rolledBack':
        return this.#settleIn(message, how)
    }
  }

  async #settle(how: 'ack' | 'nak' | 'term' | 'extend', message: PgMsg, delayMs?: number): Promise<void> {
    const call: Call = {
      do: how,
      durable: this.#durable.name,
      seq: message.seq,
      attempt: message.attempt,
      ...(delayMs === undefined ? {} : { delayMs }),
    }
    await member.call(call, () => {
      switch (how) {
        case 'ack':
          return message.ack()
        case 'nak':
          return message.nak(delayMs)
        case 'term':
          return message.term('chaos')
        case 'extend':
          return message.extend()
      }
    })
  }

  async #settleIn(message: PgMsg, how: 'transaction' | 'lateTransaction' | 'rolledBack'): Promise<void> {
    const dice = this.#dice
    const transaction = await Transaction.begin(member)
    await transaction.during(async () => {
      const call: Call = { do: 'ack', durable: this.#durable.name, seq: message.seq, attempt: message.attempt, tx: transaction.name }
      // A refusal leaves the transaction as it was; it may end either way.
      await member.tolerated(member.call(call, () => message.ack({ tx: transaction.client })))
      // Longer than its ack wait: nobody must get it while the transaction is open.
      if (how === 'lateTransaction') await member.hold(this.#durable.ackWaitMs * 1.5)
      if (how === 'rolledBack') await transaction.rollback()
      else await transaction.commit()
    })
    if (how === 'rolledBack' && dice.chance(0.6)) await this.#settle(dice.pick(['ack', 'nak', 'extend']), message)
  }
}

type HowToSettle = { [M in keyof typeof MANNERS]: keyof (typeof MANNERS)[M] }[keyof typeof MANNERS]

for (const durable of DURABLES) {
  const mine = durable.members.filter((name) => name === member.assignment.name)
  mine.forEach((_, n) => {
    const consumer = new Consumer(durable, `${durable.name} ${n}`)
    member.takes(() => consumer.step())
  })
}

/**
 * P3, P5, P6, P7: what may be delivered, and who may settle it.
 *
 * Assumes: an entry `delivered` was written when the stream yielded, so the message had been handed out by then. Attempts of one
 * message and durable are handed out one after the other; what was prefetched and handed back is handed out again under the same
 * number, but was not yielded before. A settlement that succeeded was of the delivery that was the last one handed out then.
 *
 * So no time is needed to see that a settled message was handed out again: any higher attempt will do. Fencing needs one: a settlement
 * called after a later delivery had been yielded must be refused.
 */

import { matches } from '../../../src/core/subjects.ts'
import type { Fates } from './fates.ts'
import type { History, Op, Pair, SettleCall, Yield } from './history.ts'
import type { Findings } from './report.ts'

export function checkDeliveries(history: History, fates: Fates, findings: Findings): void {
  const stored = new Map(history.final.messages.map((message) => [message.seq, message]))
  const rolledBack = new Set(history.publishes.filter((op) => fates.of(op).fate === 'no').map(({ call }) => call.id))
  const durables = new Map(history.final.durables.map((durable) => [durable.name, durable]))
  for (const one of history.yields) {
    const { seq, id, subject, durable } = one.entry
    const message = stored.get(seq)
    if (message === undefined || message.id !== id || message.subject !== subject) {
      const text = rolledBack.has(id) ? 'its publish was refused or rolled back' : 'no such message is stored'
      findings.violation(
        'deliveries: of what was published',
        `message ${seq} (${id}) was delivered, and ${text}`,
        one,
        message ?? 'not stored',
      )
    }
    const filter = durables.get(durable)?.filter
    if (filter !== undefined && !matches(filter, subject)) {
      findings.violation('deliveries: of what was published', `${durable} with the filter ${filter} was given a message on ${subject}`, one)
    }
  }
  for (const [durable, pairs] of history.pairs) {
    const maxDeliver = durables.get(durable)?.maxDeliver ?? Number.POSITIVE_INFINITY
    for (const pair of pairs.values()) {
      findings.looked('deliveries: messages')
      checkAttempts(pair, maxDeliver, findings)
      checkSettlements(pair, fates, findings)
    }
  }
}

function checkAttempts({ durable, seq, yields }: Pair, maxDeliver: number, findings: Findings): void {
  const seen = new Map<number, Yield>()
  for (const one of yields) {
    const { attempt } = one.entry
    const other = seen.get(attempt)
    if (other)
      findings.violation(
        'deliveries: an attempt once',
        `attempt ${attempt} of message ${seq} was delivered twice to ${durable}`,
        other,
        one,
      )
    seen.set(attempt, one)
    if (attempt > maxDeliver)
      findings.violation(
        'deliveries: maxDeliver',
        `message ${seq} was delivered ${attempt} times to ${durable}, which allows ${maxDeliver}`,
        one,
      )
  }
}

function checkSettlements({ durable, seq, yields, settles }: Pair, fates: Fates, findings: Findings): void {
  const succeeded = settles.filter((op) => op.call.do !== 'extend' && fates.of(op).fate === 'yes')
  for (const op of succeeded) {
    findings.looked('deliveries: settlements')
    const { attempt } = op.call
    if (op.call.do === 'nak') continue
    const again = yields.find(({ entry }) => entry.attempt > attempt)
    if (again)
      findings.violation(
        'deliveries: settled, never again',
        `message ${seq} was settled in attempt ${attempt} for ${durable}, and delivered again`,
        op,
        fatesOf(op, fates),
        again,
      )
  }
  checkTwice(succeeded, durable, seq, findings)
  if (yields.length < 2) return
  for (const op of settles) {
    if (!op.ok) continue
    findings.looked('deliveries: fencing')
    const later = yields.find(({ entry }) => entry.attempt > op.call.attempt && entry.at < op.at)
    if (later)
      findings.violation(
        'deliveries: fencing',
        `${op.call.do} of attempt ${op.call.attempt} of message ${seq} succeeded after ${durable} had been given it again`,
        later,
        op,
      )
  }
}

/** Two successes: of one delivery, or an end and anything later. */
function checkTwice(succeeded: readonly Op<SettleCall>[], durable: string, seq: number, findings: Findings): void {
  for (const [n, op] of succeeded.entries()) {
    for (const other of succeeded.slice(0, n)) {
      const bothEnd = op.call.do !== 'nak' && other.call.do !== 'nak'
      if (op.call.attempt !== other.call.attempt && !bothEnd) continue
      findings.violation('deliveries: settled once', `message ${seq} was settled twice for ${durable}`, other, op)
    }
  }
}

function fatesOf(op: Op<SettleCall>, fates: Fates): readonly Op[] {
  return op.call.tx === undefined ? [] : fates.commitsOf(op.call.tx)
}

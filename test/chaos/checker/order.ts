/**
 * P8: of one publisher's messages on one subject, one whose publish had resolved before the transaction of another began is handed out
 * before it.
 *
 * Assumes: `order` counts them and `after` is the greatest order up to which all had been answered before this call, or before its
 * transaction began. Only durables with one stream at a time are looked at, and in it only first attempts, in the order of their
 * yields: that is the order of their hand-outs, but for what was prefetched and handed back, which comes again as a first attempt and
 * later. A stream hands back what lay in its buffer for half the ack wait, or when it or its bus closes. So an inversion counts only
 * if the late one was yielded within half its ack wait of its publish, and nothing closed in between.
 */

import type { Fates } from './fates.ts'
import { getOrAdd, type History, MS, type Op, type PublishCall, type Yield } from './history.ts'
import type { Findings } from './report.ts'

const RULE = 'deliveries: in order'

interface Front {
  /** The one of those yielded that must come after the most. */
  most: { readonly one: Yield; readonly op: Op<PublishCall> } | undefined
  /** By transaction, the last in it. */
  readonly last: Map<string, { readonly one: Yield; readonly op: Op<PublishCall> }>
}

export function checkOrder(history: History, fates: Fates, findings: Findings): void {
  const published = new Map(history.publishes.map((op) => [op.call.id, op]))
  const closes = history.closes.map(({ at }) => at).sort((a, b) => a - b)
  const fronts = new Map<string, Front>()
  for (const one of history.yields) {
    const { entry, process } = one
    if (entry.attempt !== 1 || entry.dlq || !history.solo.has(entry.durable)) continue
    const op = published.get(entry.id)
    if (!op) continue
    const key = `${process.file} ${entry.stream} ${op.call.publisher} ${op.call.subject}`
    const front = getOrAdd(fronts, key, (): Front => ({ most: undefined, last: new Map() }))
    findings.looked(RULE)
    const { most } = front
    const { tx, order } = op.call
    const transaction = tx?.split('/')[0]
    const sibling = transaction === undefined ? undefined : front.last.get(transaction)
    const before = most && most.op.call.after >= order ? most : sibling && sibling.op.call.order > order ? sibling : undefined
    if (before && isCertain(one, op, fates, closes)) {
      findings.violation(
        RULE,
        `${entry.durable} was given ${before.one.entry.id} before ${entry.id}, which was published earlier`,
        before.op,
        op,
        before.one,
        one,
      )
    }
    if (!most || op.call.after > most.op.call.after) front.most = { one, op }
    if (transaction !== undefined && !(sibling && sibling.op.call.order > order)) front.last.set(transaction, { one, op })
  }
}

/** It cannot have been handed back before. */
function isCertain({ entry }: Yield, op: Op<PublishCall>, fates: Fates, closes: readonly number[]): boolean {
  const { from } = fates.of(op)
  const since = Number.isFinite(from) ? Math.max(from, op.at) : op.at
  return entry.at < since + (entry.ackWaitMs * MS) / 2 && !closes.some((at) => at >= since && at <= entry.at)
}

/**
 * P5, P10: a message is not handed out again before the previous delivery's ack wait is over, unless it was given back; after a nak
 * with a delay not before the delay is over.
 *
 * When a delivery was handed out is not recorded, only when it was yielded, which may be later by what it lay in the stream's
 * buffer. What is certain of the moment of hand-out:
 *   - it is not before the publish was called, or its commit;
 *   - it is not before the hand-out of the attempt before, nor before that one was free: its own ack wait was over, or it was given back;
 *   - it is not before the yield less the ack wait, since a stream drops what ran out before it yields it; where the process was stopped
 *     until just before the yield was written down, it may have looked at the clock before it was stopped;
 *   - where the stream holds one message at a time, it is not before it was asked for (`handedOutAfter`).
 * The ack wait is over no earlier than that moment plus `ackWaitMs`, nor than the call of the last extend that succeeded plus
 * `ackWaitMs`: an extend sets the timeout from when it arrives and never shortens it. An extend while an ack in an open transaction
 * holds the message extends nothing; so none counts that had not been answered when such an ack was called.
 * A nak gives it back, unless it was refused; so may the close of the bus that holds it; a delivery that another one of the same
 * durable missed in between (it was handed out and never yielded) only makes the bound too low.
 *
 * Assumes the server's clock runs as the machine's does, within {@link TOLERANCE_US}.
 */

import { type Fates, isRefusal } from './fates.ts'
import { type Fault, type History, MS, type Pair, type Yield } from './history.ts'
import type { Findings } from './report.ts'

export const TOLERANCE_US = 50 * MS

const RULE = 'deliveries: not before the ack wait is over'

/** When processes were stopped, and went on. */
type Stops = ReadonlyMap<string, readonly { readonly from: number; readonly to: number }[]>

function stopsIn(faults: readonly Fault[]): Stops {
  const stops = new Map<string, { from: number; to: number }[]>()
  for (const { fault, target, at } of faults) {
    if (target === undefined) continue
    const mine = stops.get(target) ?? []
    stops.set(target, mine)
    const last = mine.at(-1)
    if (fault === 'stop') mine.push({ from: at, to: Number.POSITIVE_INFINITY })
    else if (fault === 'continue' && last) last.to = at
  }
  return stops
}

/** When the stream looked at the clock, at the earliest. */
function lookedAt({ entry: { at }, process: { name, file } }: Yield, stops: Stops): number {
  const mine = [...(stops.get(name) ?? []), ...(name === file ? [] : (stops.get(file) ?? []))]
  return Math.min(at, ...mine.filter(({ from, to }) => from < at && to > at - TOLERANCE_US).map(({ from }) => from))
}

export function checkAckWaits(history: History, fates: Fates, findings: Findings): void {
  const stops = stopsIn(history.faults)
  const publishedFrom = new Map<string, number>()
  for (const op of history.publishes) publishedFrom.set(op.call.id, Math.max(op.at, fates.of(op).fate === 'yes' ? fates.of(op).from : 0))
  for (const pairs of history.pairs.values())
    for (const pair of pairs.values()) if (pair.yields.length > 1) checkPair(pair, publishedFrom, stops, findings)
}

function checkPair(pair: Pair, publishedFrom: ReadonlyMap<string, number>, stops: Stops, findings: Findings): void {
  // By attempt: a stream may yield late what was handed out early.
  const yields = [...pair.yields].sort((a, b) => a.entry.attempt - b.entry.attempt)
  const { id, dlq } = (yields[0] as Yield).entry
  // Of a dead letter it is only known that the original came first.
  let handedOut = publishedFrom.get(id) ?? 0
  for (const [n, one] of yields.entries()) {
    const { entry } = one
    handedOut = Math.max(handedOut, lookedAt(one, stops) - entry.ackWaitMs * MS, entry.handedOutAfter ?? 0)
    const next = yields[n + 1]
    if (!next) break
    const free = freeAfter(pair, one, handedOut)
    findings.looked(RULE)
    if (free.held) findings.looked(`${RULE}, and was held`)
    if (next.entry.at < free.at - TOLERANCE_US) {
      const early = Math.round((free.at - next.entry.at) / MS)
      findings.violation(
        RULE,
        `message ${pair.seq}${dlq ? ' (a dead letter)' : ''} was handed out again to ${pair.durable} at least ${early} ms too early`,
        one,
        ...pair.settles.filter(({ call }) => call.attempt === entry.attempt),
        next,
      )
    }
    handedOut = Math.max(handedOut, Math.min(free.at, next.entry.at))
  }
}

/** When somebody else could get it at the earliest. */
function freeAfter(pair: Pair, { entry, process }: Yield, handedOut: number): { at: number; held: boolean } {
  const mine = pair.settles.filter(({ call }) => call.attempt === entry.attempt)
  let at = handedOut + entry.ackWaitMs * MS
  const acked = Math.min(...mine.filter(({ call }) => call.do === 'ack' && call.tx !== undefined).map((op) => op.at))
  for (const op of mine) if (op.ok && op.call.do === 'extend' && op.end < acked) at = Math.max(at, op.at + entry.ackWaitMs * MS)
  const naks = mine.filter((op) => op.call.do === 'nak' && !isRefusal(op))
  for (const op of naks) {
    if (op.ok) return { at: Math.max(handedOut, op.at + (op.call.delayMs ?? 0) * MS), held: false }
    at = Math.min(at, op.at)
  }
  for (const { call, at: closedAt } of process.closes) {
    if (call.stream === undefined && call.member === entry.member) at = Math.min(at, closedAt)
  }
  return { at, held: naks.length === 0 }
}

/**
 * P1, P12: what was acknowledged is stored, once; what was rolled back is not.
 *
 * Assumes: no message is removed during a run, so the tables at the end hold all that was ever stored. Every publish carries an id of
 * its own as its payload. A dead letter carries the payload of the original and is told from it by the header `dlq_reason`.
 *
 * Duplicates are looked for only where they are certain: two publishes with one `msgId` of which the second was answered, or its
 * commit was, within the window counted from the call of the first. The window begins when the first stores its id, which is not
 * before its call.
 */

import type { Answers } from '../record.ts'
import type { Fates } from './fates.ts'
import { type History, MS, type Op, type PublishCall, type StoredMessage } from './history.ts'
import type { Findings } from './report.ts'

const WINDOW_US = 120_000 * MS

/** The stored messages without the dead letters, by id. */
export function originalsById(history: History): Map<string, StoredMessage[]> {
  const byId = new Map<string, StoredMessage[]>()
  for (const message of history.final.messages) {
    if (message.id === null || isDeadLetter(message)) continue
    const others = byId.get(message.id)
    if (others) others.push(message)
    else byId.set(message.id, [message])
  }
  return byId
}

export function isDeadLetter({ headers }: { readonly headers: Readonly<Record<string, string>> }): boolean {
  return headers.dlq_reason !== undefined
}

export function checkStored(history: History, fates: Fates, findings: Findings): void {
  const byId = originalsById(history)
  const published = new Map<string, Op<PublishCall>>()
  for (const op of history.publishes) {
    published.set(op.call.id, op)
    checkPublish(op, byId.get(op.call.id) ?? [], fates, findings)
  }
  for (const [id, messages] of byId) {
    if (!published.has(id))
      findings.violation('publish: nothing from nowhere', `message ${id} is stored, and nobody published it`, messages)
  }
  checkMsgIds(history, byId, fates, findings)
}

function checkPublish(op: Op<PublishCall>, stored: readonly StoredMessage[], fates: Fates, findings: Findings): void {
  const { id, subject, tx } = op.call
  const { fate } = fates.of(op)
  const commits = tx === undefined ? [] : fates.commitsOf(tx)
  findings.looked(`publish: ${fate === 'yes' ? 'took effect' : fate === 'no' ? 'did not' : 'unknown'}`)
  if (stored.length > 1) findings.violation('publish: stored once', `message ${id} is stored ${stored.length} times`, op, stored)
  if (stored.some((message) => message.subject !== subject))
    findings.violation('publish: stored once', `message ${id} is stored on another subject`, op, stored)
  if (fate === 'no' && stored.length > 0) {
    findings.violation(
      'publish: rolled back, not stored',
      `message ${id} is stored, and its publish was refused or rolled back`,
      op,
      stored,
      commits,
    )
  }
  if (fate !== 'yes' || !op.ok) return
  const { seq, duplicate } = op.answer as Answers['publish']
  if (duplicate) {
    if (stored.length > 0)
      findings.violation('publish: duplicates store nothing', `message ${id} was answered as a duplicate, and is stored`, op, stored)
  } else if (stored.length === 0) {
    findings.violation('publish: acknowledged, stored', `message ${id} was acknowledged, and is not stored`, op, commits)
  } else if (stored[0]?.seq !== seq) {
    findings.violation('publish: acknowledged, stored', `message ${id} is stored with another seq than was answered`, op, stored)
  }
}

function checkMsgIds(history: History, byId: Map<string, StoredMessage[]>, fates: Fates, findings: Findings): void {
  const bySeq = new Map(history.final.messages.map((message) => [message.seq, message]))
  const byMsgId = Map.groupBy(
    history.publishes.filter(({ call }) => call.msgId !== undefined),
    ({ call }) => call.msgId as string,
  )
  for (const [msgId, ops] of byMsgId) {
    if (ops.length < 2) continue
    findings.looked('publish: message ids used again')
    const ids = new Set(ops.map(({ call }) => call.id))
    // In the order of their calls: whichever stored first did so no earlier than the first call.
    const stored = ops.filter(({ call }) => byId.has(call.id))
    for (let n = 1; n < stored.length; n++) {
      const [first, next] = [stored[n - 1] as Op<PublishCall>, stored[n] as Op<PublishCall>]
      const to = Math.max(first.end, next.end, fates.of(first).to, fates.of(next).to)
      if (to < first.at + WINDOW_US) {
        findings.violation('publish: one message a msgId', `two messages with the msgId ${msgId} are stored within its window`, first, next)
      }
    }
    for (const op of ops) {
      if (!op.ok || !(op.answer as Answers['publish']).duplicate || fates.of(op).fate !== 'yes') continue
      const { seq } = op.answer as Answers['publish']
      const message = bySeq.get(seq)
      if (!message || message.id === null || !ids.has(message.id)) {
        findings.violation(
          'publish: one message a msgId',
          `a duplicate of msgId ${msgId} was answered seq ${seq}, which is not the first one's`,
          op,
          message ?? 'no message has this seq',
        )
      }
    }
  }
}

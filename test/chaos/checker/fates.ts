/**
 * Whether a call took effect, and when.
 *
 * Assumes: a call that was refused by a rule of the bus did nothing. A call that was not answered, or answered with a lost
 * connection and the like, may have taken effect at any time after it was made, or never. A call in a transaction takes effect with
 * its commit; one in a savepoint that was rolled back never does. A transaction that nobody tried to commit never committed.
 *
 * A commit without an answer is decided by what can be seen of its transaction: messages stay stored for the whole run, so one that
 * is there or is not decides for all; a job that was seen, or a revision that was read, shows that it did commit.
 *
 * `lease_lost` and `already_settled` are refusals only where the answer came quickly: the bus asks again after a lost connection, and
 * by then what the first try did looks like somebody else's doing. It pauses for {@link RETRY_US} at the least before it does.
 */

import type { Answers } from '../record.ts'
import { type History, MS, type Op } from './history.ts'

/** `yes`: between `from` and `to`. `maybe`: after `from`, or never. */
export interface Effect {
  readonly fate: 'yes' | 'no' | 'maybe'
  readonly from: number
  readonly to: number
}

const NEVER: Effect = { fate: 'no', from: Number.POSITIVE_INFINITY, to: Number.POSITIVE_INFINITY }
const RETRY_US = 25 * MS
const REFUSALS = new Set([
  'not_found',
  'conflict',
  'cas_conflict',
  'lease_held',
  'invalid_argument',
  'payload_too_large',
  'schema_outdated',
  'unsupported',
  'permission_denied',
])
const SETTLED_OTHERWISE = new Set(['lease_lost', 'already_settled'])
/** A COMMIT that was answered with these did not happen: what was violated, rolled back or aborted before. */
const NOT_COMMITTED = /^sql:(rolled_back|(23|25|40|53|54|55)[0-9A-Z]{3})$/

export function isRefusal(op: Op): boolean {
  return op.outcome === 'err' && (REFUSALS.has(op.code) || (SETTLED_OTHERWISE.has(op.code) && op.end - op.at < RETRY_US))
}

interface Transaction {
  readonly commits: Op[]
  readonly effect: Effect
}

export class Fates {
  readonly #transactions = new Map<string, Transaction>()
  readonly #rolledBack = new Set<string>()

  constructor(history: History) {
    const commits = new Map<string, Op[]>()
    for (const op of history.ends) {
      const { do: what, tx } = op.call
      if (what === 'rollback') {
        this.#rolledBack.add(tx)
        continue
      }
      const others = commits.get(tx)
      if (others) others.push(op)
      else commits.set(tx, [op])
    }
    for (const [tx, ops] of commits) this.#transactions.set(tx, { commits: ops, effect: this.#committed(ops) })
    this.#decide(history)
  }

  of(op: Op): Effect {
    const { call } = op
    const tx = 'tx' in call && call.do !== 'commit' && call.do !== 'rollback' ? call.tx : undefined
    if (tx === undefined) {
      if (op.ok) return { fate: 'yes', from: op.at, to: op.end }
      return isRefusal(op) ? NEVER : { fate: 'maybe', from: op.at, to: Number.POSITIVE_INFINITY }
    }
    if (op.outcome === 'err') return NEVER
    const effect = this.ofTransaction(tx)
    // Whoever has no answer cannot have gone on to commit, unless somebody else did.
    return op.outcome === 'none' && effect.fate === 'yes' ? { ...effect, fate: 'maybe' } : effect
  }

  /** @param tx of a call, so perhaps with a savepoint */
  ofTransaction(tx: string): Effect {
    const parts = tx.split('/')
    for (let n = 2; n <= parts.length; n++) if (this.#rolledBack.has(parts.slice(0, n).join('/'))) return NEVER
    return this.#transactions.get(parts[0] as string)?.effect ?? NEVER
  }

  /** How the transaction ended, for evidence. */
  commitsOf(tx: string): readonly Op[] {
    return this.#transactions.get(tx.split('/')[0] as string)?.commits ?? []
  }

  #committed(commits: readonly Op[]): Effect {
    const from = Math.min(...commits.map(({ at }) => at))
    const ok = commits.filter((op) => op.ok)
    if (ok.length > 0) return { fate: 'yes', from, to: Math.min(...ok.map(({ end }) => end)) }
    if (commits.every((op) => op.outcome === 'err' && NOT_COMMITTED.test(op.code))) return NEVER
    return { fate: 'maybe', from, to: Number.POSITIVE_INFINITY }
  }

  /** Whether those whose commit was not answered have committed, by what can be seen of them. */
  #decide(history: History): void {
    // By the end of the run whatever can be seen then has taken effect.
    const atTheEnd = history.lastAt + 1
    const seen = (op: Op, yes: boolean, to = atTheEnd) => {
      const tx = 'tx' in op.call ? op.call.tx : undefined
      if (tx === undefined || !op.ok || this.of(op).fate !== 'maybe') return
      const name = tx.split('/')[0] as string
      const { commits, effect } = this.#transactions.get(name) as Transaction
      this.#transactions.set(name, { commits, effect: yes ? { ...effect, fate: 'yes', to } : NEVER })
    }
    const stored = new Map(history.final.messages.map(({ seq, id }) => [seq, id]))
    for (const op of history.publishes) {
      if (op.call.tx === undefined || !op.ok) continue
      const { seq, duplicate } = op.answer as Answers['publish']
      if (!duplicate) seen(op, stored.get(seq) === op.call.id)
    }
    const jobs = new Set<string>()
    for (const { id } of history.final.jobs) jobs.add(id)
    for (const { grants } of history.jobs.values()) for (const { id } of grants) jobs.add(id)
    for (const op of history.enqueues) if (jobs.has(op.call.id)) seen(op, true)
    const revisions = new Set<string>()
    for (const { key, revision } of history.final.entries) revisions.add(`${key} ${revision}`)
    for (const { call, ok, answer, actual } of history.keys) {
      if (call.do === 'get' && ok) revisions.add(`${call.key} ${(answer as Answers['get']).revision}`)
      if (actual != null) revisions.add(`${call.key} ${actual}`)
      if (ok && (call.do === 'cas' || call.do === 'delete') && call.expected != null) revisions.add(`${call.key} ${call.expected}`)
    }
    for (const op of history.keys) {
      if (op.call.do !== 'put' && op.call.do !== 'cas') continue
      if (op.ok && revisions.has(`${op.call.key} ${(op.answer as Answers['put']).revision}`)) seen(op, true)
    }
  }
}

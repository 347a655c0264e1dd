/**
 * K1, K2, K3, K4: every key behaves like one register.
 *
 * Assumes: keys have no ttl and are absent at the start; a value is an id that one call wrote; the revision of a write is drawn when it
 * is made, and one in a transaction takes effect with the commit, holding the key locked until then. A deletion in a transaction that
 * finds nothing locks nothing: it did nothing, when it was made. A conditional write in a transaction is refused for what it sees when
 * it is made, its own transaction's writes included: those are not looked at.
 *
 * What each key must agree with at the end is one more read of it, after everything else.
 */

import type { Answers } from '../record.ts'
import type { Fates } from './fates.ts'
import type { History, KeyCall, Op } from './history.ts'
import { type Deletion, linearizable, type Read, type Register, type Unseen, type Write } from './linearizable.ts'
import type { Findings } from './report.ts'

const RULE = 'kv: one register a key'

export function checkKeys(history: History, fates: Fates, findings: Findings): void {
  const entries = new Map(history.final.entries.map((entry) => [entry.key, entry]))
  const byKey = Map.groupBy(history.keys, ({ call }) => call.key)
  for (const [key, ops] of byKey) {
    findings.looked('kv: keys')
    findings.looked('kv: calls', ops.length)
    const register = new Reader(key, ops, fates, findings).register(history.lastAt, entries.get(key))
    const verdict = linearizable(register)
    if (!verdict.ok) findings.violation(RULE, `key ${key}: ${verdict.why}`, ...verdict.stuck)
  }
  for (const [key, entry] of entries) {
    if (!byKey.has(key)) findings.violation(RULE, `key ${key} is there at the end, and no call wrote it`, entry)
  }
}

interface Sighting {
  readonly value: string
  readonly revision: number
  readonly what: unknown
}

class Reader {
  readonly #key: string
  readonly #ops: readonly Op<KeyCall>[]
  readonly #fates: Fates
  readonly #findings: Findings
  readonly #writes: Write[] = []
  readonly #reads: Read[] = []
  readonly #deletions: Deletion[] = []
  readonly #maybeDeleted: { from: number; expected?: number }[] = []
  readonly #maybeWritten: Unseen[] = []
  readonly #revisionOf = new Map<string, number>()

  constructor(key: string, ops: readonly Op<KeyCall>[], fates: Fates, findings: Findings) {
    this.#key = key
    this.#ops = ops
    this.#fates = fates
    this.#findings = findings
  }

  register(lastAt: number, final: { readonly value: string; readonly revision: number } | undefined): Register {
    const after = { from: lastAt + 2, to: lastAt + 2, what: `at the end: ${final ? JSON.stringify(final) : 'absent'}` }
    this.#reads.push({ ...after, revision: final?.revision ?? null })
    this.#see(final ? [{ ...final, what: after.what }] : [])
    const inTransactions = new Map<string, Op<KeyCall>[]>()
    for (const op of this.#ops) {
      const { call } = op
      if (call.do === 'get') this.#read(op)
      else if (op.code === 'cas_conflict') this.#refused(op, inTransactions)
      else if (call.tx === undefined) this.#alone(op)
      else if (this.#fates.of(op).fate !== 'no') {
        const tx = call.tx.split('/')[0] as string
        const others = inTransactions.get(tx)
        if (others) others.push(op)
        else inTransactions.set(tx, [op])
      }
    }
    for (const ops of inTransactions.values()) this.#together(ops)
    return {
      writes: this.#writes,
      reads: this.#reads,
      deletions: this.#deletions,
      maybeDeleted: this.#maybeDeleted,
      maybeWritten: this.#maybeWritten,
      phantoms: this.#phantoms(),
    }
  }

  /** Which revision each value has, by those who saw both. */
  #see(last: readonly Sighting[]): void {
    const sightings = new Map<number, Sighting>()
    const written = new Map<string, Op<KeyCall>>()
    for (const op of this.#ops) if (op.call.do === 'put' || op.call.do === 'cas') written.set(op.call.value, op)
    const gets = this.#ops.flatMap((op): Sighting[] => {
      if (op.call.do !== 'get' || !op.ok) return []
      const { value, revision } = op.answer as Answers['get']
      return value === null || revision === null ? [] : [{ value, revision, what: op }]
    })
    for (const seen of [...gets, ...last]) {
      const other = sightings.get(seen.revision)
      if (other && other.value !== seen.value) this.#fail(`revision ${seen.revision} was read with two values`, other.what, seen.what)
      sightings.set(seen.revision, seen)
      const writer = written.get(seen.value)
      if (!writer) {
        this.#fail(`the value ${seen.value} was read and nobody wrote it`, seen.what)
        continue
      }
      const known = this.#revisionOf.get(seen.value) ?? (writer.ok ? (writer.answer as Answers['put']).revision : undefined)
      if (known !== undefined && known !== seen.revision)
        this.#fail(`the value of revision ${known} was read at revision ${seen.revision}`, writer, seen.what)
      this.#revisionOf.set(seen.value, known ?? seen.revision)
    }
  }

  #fail(text: string, ...evidence: unknown[]): void {
    this.#findings.violation(RULE, `key ${this.#key}: ${text}`, ...evidence)
  }

  #read(op: Op<KeyCall>): void {
    if (op.ok) this.#reads.push({ from: op.at, to: op.end, revision: (op.answer as Answers['get']).revision, what: op })
  }

  /** A refusal tells what was there. */
  #refused(op: Op<KeyCall>, inTransactions: Map<string, readonly Op<KeyCall>[]>): void {
    const { call, actual } = op
    if (call.do === 'get' || call.do === 'put' || actual === undefined) return
    if ((call.expected ?? null) === actual) this.#fail('a call was refused although the key was as it expected', op)
    if (call.tx !== undefined && this.#ops.some((other) => other !== op && sameTransaction(other, op) && other.at < op.at && other.ok))
      return
    // A transaction that rolled back wrote before: not in this list, and seen by nobody else.
    if (call.tx !== undefined && inTransactions.has(call.tx.split('/')[0] as string)) return
    this.#reads.push({ from: op.at, to: op.end, revision: actual, what: op })
  }

  #alone(op: Op<KeyCall>): void {
    const { call } = op
    const { fate, from, to } = this.#fates.of(op)
    if (fate === 'no' || call.do === 'get') return
    if (call.do === 'delete') {
      const expected = call.expected === undefined ? {} : { expected: call.expected }
      if (fate === 'yes') this.#deletions.push({ from, to, what: op, ...expected })
      else this.#maybeDeleted.push({ from, ...expected })
      return
    }
    const revision = fate === 'yes' ? (op.answer as Answers['put']).revision : this.#revisionOf.get(call.value)
    const expected = call.do === 'cas' ? { expected: call.expected } : {}
    if (revision !== undefined) this.#writes.push({ from, to, revision, what: op, ...expected })
    else this.#maybeWritten.push({ from, ...expected })
  }

  /** The writes of one transaction: what is left of them at its commit, on the condition of the first. */
  #together(ops: readonly Op<KeyCall>[]): void {
    const first = ops[0] as Op<KeyCall>
    const { fate, from, to } = this.#fates.of(first)
    const condition = first.call.do === 'cas' || first.call.do === 'delete' ? first.call.expected : undefined
    const expected = condition === undefined ? {} : { expected: condition }
    let revision: number | null | undefined = condition
    let last: number | undefined
    let deleted = false
    for (const op of ops) {
      const { call } = op
      if (op !== first && call.do === 'cas' && revision !== undefined && call.expected !== revision) {
        this.#fail(`a cas succeeded that expected ${call.expected}, after its own transaction had left ${revision}`, first, op)
      }
      deleted = call.do === 'delete'
      if (call.do === 'put' || call.do === 'cas') {
        const drawn = op.ok ? (op.answer as Answers['put']).revision : this.#revisionOf.get(call.value)
        if (last !== undefined && drawn !== undefined && drawn <= last) this.#fail('revisions do not grow within a transaction', first, op)
        last = drawn ?? last
        revision = drawn
      } else revision = null
    }
    const onlyDeleted = ops.every(({ call }) => call.do === 'delete')
    if (fate === 'yes') {
      if (onlyDeleted) {
        const at = condition === undefined ? { at: { from: first.at, to: first.end } } : {}
        this.#deletions.push({ from, to, what: first, ...at, ...(condition == null ? {} : { expected: condition }) })
      } else if (last !== undefined)
        this.#writes.push({
          from,
          to,
          revision: last,
          what: ops.length === 1 ? first : ops.join(' + '),
          leavesAbsent: deleted,
          ...expected,
        })
      else this.#maybeWritten.push({ from, ...expected })
      return
    }
    // What was read of it has decided that it committed; so nobody saw what it wrote, but it may have deleted.
    if (deleted) this.#maybeDeleted.push({ from, ...(onlyDeleted && condition != null ? { expected: condition } : {}) })
    else if (last === undefined) this.#maybeWritten.push({ from, ...expected })
    else if (ops.some((op) => op.outcome === 'none' && 'value' in op.call && this.#revisionOf.has(op.call.value))) {
      this.#writes.push({ from, to, revision: last, what: first, ...expected })
    }
  }

  /** Revisions that others found or expected and that are those of no write. */
  #phantoms(): number[] {
    if (this.#maybeWritten.length === 0) return []
    const known = new Set(this.#writes.map(({ revision }) => revision))
    // What was answered and rolled back is nobody's.
    for (const { call, ok, answer } of this.#ops)
      if ((call.do === 'put' || call.do === 'cas') && ok) known.add((answer as Answers['put']).revision)
    const seen = new Set<number>()
    for (const { revision } of this.#reads) if (revision !== null) seen.add(revision)
    for (const { expected } of [...this.#writes, ...this.#deletions]) if (expected != null) seen.add(expected)
    return [...seen].filter((revision) => !known.has(revision))
  }
}

function sameTransaction(a: Op<KeyCall>, b: Op<KeyCall>): boolean {
  const of = ({ call }: Op<KeyCall>) => ('tx' in call && call.tx !== undefined ? call.tx.split('/')[0] : undefined)
  return of(a) !== undefined && of(a) === of(b)
}

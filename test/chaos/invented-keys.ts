/** Histories of a key that a simulated register made, what breaks them, and a checker too simple to be wrong. */

import type { Deletion, Read, Register, Unseen, Write } from './checker/linearizable.ts'

/** Numbers from a seed: mulberry32. */
export function dice(seed: number): (below: number) => number {
  let state = seed >>> 0
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0
    let t = state
    t = Math.imul(t ^ (t >>> 15), t | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) % below
  }
}

interface Mutable {
  writes: Write[]
  reads: Read[]
  deletions: Deletion[]
  maybeDeleted: { from: number; expected?: number }[]
  maybeWritten: Unseen[]
  phantoms: number[]
}

/**
 * What a register answered, call by call at times that grow; each call is from a while before its effect to a while after it. Some
 * answers are lost: then the call had its effect much later than it was called, or none.
 * @param changes how many calls are given another time or answer afterwards, so that it may be right no longer
 */
export function simulate(seed: number, calls: number, changes = 0): Register {
  const roll = dice(seed)
  const made: Mutable = { writes: [], reads: [], deletions: [], maybeDeleted: [], maybeWritten: [], phantoms: [] }
  let revision = 0
  let current: number | null = null
  const unseen = new Map<number, Unseen>()
  const seen = (of: number | null) => {
    if (of !== null && unseen.has(of) && !made.phantoms.includes(of)) made.phantoms.push(of)
  }
  for (let n = 1; n <= calls; n++) {
    const now = n * 10
    const span = { from: now - roll(30), to: now + roll(30), what: `call ${n}` }
    const isLost = roll(12) === 0
    const early = { from: now - roll(200) }
    const guess: number | null = roll(3) === 0 ? Math.max(1, revision - roll(3)) : current
    switch (roll(8)) {
      case 0:
      case 1:
        if (isLost) {
          const lost: Unseen = early
          made.maybeWritten.push(lost)
          if (roll(2) === 0) {
            current = ++revision
            unseen.set(revision, lost)
          }
        } else {
          current = ++revision
          made.writes.push({ ...span, revision })
        }
        break
      case 2:
        if (isLost) {
          const lost: Unseen = { ...early, expected: guess }
          made.maybeWritten.push(lost)
          if (guess === current && roll(2) === 0) {
            seen(guess)
            current = ++revision
            unseen.set(revision, lost)
          }
        } else if (guess === current) {
          seen(guess)
          current = ++revision
          made.writes.push({ ...span, revision, expected: guess })
        } else {
          seen(current)
          made.reads.push({ ...span, revision: current })
        }
        break
      case 3:
        if (isLost) {
          made.maybeDeleted.push(early)
          if (roll(2) === 0) current = null
        } else {
          current = null
          made.deletions.push(span)
        }
        break
      case 7:
        // In a transaction: it found nothing, or holds the key until its commit, which is now.
        if (current === null) {
          const commit = now + 40 + roll(60)
          made.deletions.push({
            from: commit,
            to: commit + roll(30),
            at: { from: span.from, to: span.to },
            what: `call ${n} in a transaction`,
          })
        } else {
          current = null
          made.deletions.push({ ...span, at: { from: now - 60 - roll(30), to: now - 31 - roll(20) } })
        }
        break
      case 4:
        if (guess === null) break
        if (isLost) {
          made.maybeDeleted.push({ ...early, expected: guess })
          if (guess === current && roll(2) === 0) current = null
        } else if (guess === current) {
          seen(guess)
          current = null
          made.deletions.push({ ...span, expected: guess })
        }
        break
      default:
        seen(current)
        made.reads.push({ ...span, revision: current })
    }
  }
  for (let n = 0; n < changes; n++) change(made, roll, calls)
  return made
}

function change(made: Mutable, roll: (below: number) => number, calls: number): void {
  const kinds = [made.writes, made.reads, made.deletions].filter(({ length }) => length > 0)
  if (kinds.length === 0) return
  const spans = kinds[roll(kinds.length)] as (Write | Read | Deletion)[]
  const n = roll(spans.length)
  const from = roll(calls * 10)
  const span = spans[n] as Deletion
  // A commit comes after the calls of its transaction.
  const at = span.at && { at: { from: from - 20 - roll(40), to: from - 1 - roll(19) } }
  spans[n] = { ...span, from, to: from + roll(30), what: 'moved', ...at } as Write
}

export type Fault = 'lost update' | 'stale read' | 'resurrected value' | 'reused revision'

/** The same register with one fault that no order explains; `undefined` where the history has no place for it. */
export function corrupt(register: Register, fault: Fault, seed: number): Register | undefined {
  const roll = dice(seed + 1)
  const pick = <T>(of: readonly T[]): T | undefined => of[roll(of.length || 1)]
  const { writes, reads, deletions } = register
  switch (fault) {
    case 'lost update': {
      // Somebody succeeded with an expected revision that somebody else had replaced already.
      const first = pick(writes.filter(({ expected }) => expected != null))
      if (!first) return undefined
      const revision = Math.max(...writes.map((write) => write.revision), ...register.phantoms) + 1
      return {
        ...register,
        writes: [...writes, { from: first.from, to: Number.POSITIVE_INFINITY, what: fault, revision, expected: first.expected as number }],
      }
    }
    case 'stale read': {
      const later = pick(writes.slice(1))
      const earlier = later && writes.filter(({ revision }) => revision < later.revision).at(-1)
      if (!later || !earlier) return undefined
      return { ...register, reads: [...reads, { from: later.to + 1, to: later.to + 2, what: fault, revision: earlier.revision }] }
    }
    case 'resurrected value': {
      const deletion = pick(
        deletions.filter(({ expected }) => expected !== undefined && writes.some(({ revision }) => revision === expected)),
      )
      if (!deletion) return undefined
      return {
        ...register,
        reads: [...reads, { from: deletion.to + 1, to: deletion.to + 2, what: fault, revision: deletion.expected as number }],
      }
    }
    case 'reused revision': {
      const write = pick(writes)
      return write && { ...register, writes: [...writes, { from: write.to + 1, to: write.to + 9, what: fault, revision: write.revision }] }
    }
  }
}

interface Step {
  readonly from: number
  readonly to: number
  readonly optional: boolean
  /** The state after it, or `undefined` if it cannot be then. */
  apply(state: number | null): readonly (number | null)[]
}

/**
 * Tries every order. An effect of unknown fate is tried at every place and left out; a write of unknown fate is tried with every
 * revision that was seen and is nobody's, and with one that nobody saw.
 */
export function bruteForce(register: Register): boolean {
  // A deletion in a transaction did nothing when it was asked for, or took effect with its commit.
  const n = register.deletions.findIndex(({ at }) => at !== undefined)
  if (n < 0) return tryAll(register)
  const { from, to, at, what } = register.deletions[n] as Deletion
  const others = register.deletions.filter((_, k) => k !== n)
  const didNothing = { ...register, deletions: others, reads: [...register.reads, { from, to, ...at, what, revision: null }] }
  return bruteForce(didNothing) || bruteForce({ ...register, deletions: [...others, { from, to, what }] })
}

function tryAll({ writes, reads, deletions, maybeDeleted, maybeWritten, phantoms }: Register): boolean {
  const known = new Set([...writes.map(({ revision }) => revision), ...phantoms])
  if (known.size < writes.length + phantoms.length) return false
  const fits = (expected: number | null | undefined, state: number | null) => expected === undefined || expected === state
  const must = (span: { from: number; to: number }, apply: Step['apply']): Step => ({
    from: span.from,
    to: span.to,
    optional: false,
    apply,
  })
  const may = ({ from }: { from: number }, apply: Step['apply']): Step => ({ from, to: Number.POSITIVE_INFINITY, optional: true, apply })
  const UNSEEN = -1
  const steps: Step[] = [
    ...writes.map((write) => must(write, (state) => (fits(write.expected, state) ? [write.leavesAbsent ? null : write.revision] : []))),
    ...reads.map((read) => must(read, (state) => (state === read.revision ? [state] : []))),
    ...deletions.map((deletion) => must(deletion, (state) => (fits(deletion.expected, state) ? [null] : []))),
    ...maybeDeleted.map((deletion) => may(deletion, (state) => (fits(deletion.expected, state) ? [null] : []))),
    ...maybeWritten.map((write) => may(write, (state) => (fits(write.expected, state) ? [UNSEEN, ...phantoms] : []))),
  ]
  const revisionOf = (step: number) => (step < writes.length ? (writes[step] as Write).revision : undefined)
  const tried = new Set<string>()
  const search = (placed: number, state: number | null, last: number, used: number): boolean => {
    const left = steps.map((_, n) => n).filter((n) => (placed & (1 << n)) === 0)
    const needed = left.filter((n) => !(steps[n] as Step).optional)
    if (needed.length === 0 && used === 2 ** phantoms.length - 1) return true
    const key = `${placed} ${state} ${last} ${used}`
    if (tried.has(key)) return false
    tried.add(key)
    const bound = Math.min(...needed.map((n) => (steps[n] as Step).to))
    for (const n of left) {
      const step = steps[n] as Step
      if (step.from > bound) continue
      for (const next of step.apply(state)) {
        const phantom = step.optional && next !== null && next !== UNSEEN ? phantoms.indexOf(next) : -1
        const revision = phantom >= 0 ? next : revisionOf(n)
        if (revision != null && revision <= last) continue
        if (phantom >= 0 && (used & (1 << phantom)) !== 0) continue
        if (search(placed | (1 << n), next, revision ?? last, phantom >= 0 ? used | (1 << phantom) : used)) return true
      }
    }
    return false
  }
  return search(0, null, 0, 0)
}

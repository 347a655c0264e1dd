/**
 * Whether the history of one key could have come from one register: an exact search after Wing and Gong with Lowe's memory of
 * states that were tried, made quick by the revisions.
 *
 * A write that succeeded is known by its revision, and revisions grow in the order of effect: so the writes are one chain, and what
 * is left to find out is where, between them, the key was absent. Along the chain
 *
 *   present(i)   after the i-th write; reads of that revision are made here
 *   absent(i)    after a deletion; reads that found nothing are made here
 *
 * and a step is the next write, or a deletion. A step may be made when nobody who has yet to be placed was answered before the step's
 * call (`bound` is the first such answer). A read that fits is placed at once: it changes nothing, and all that must be before it is.
 *
 * Deletions have no revision. Of those that must be placed, the one whose answer came first is taken: they are all alike, and the
 * others keep longer. Of those that nobody knows the end of any will do, since none of them runs out; one with an expected revision
 * can only have happened at that revision. One in a transaction did nothing when it was asked for, or takes effect with its commit;
 * which of the two is decided when nothing else can be placed before its answer. (With its commit it must find something, for it holds
 * what it found; but that may be a write of unknown fate that nobody saw, so it is not asked for.)
 *
 * A write of unknown fate that nobody ever saw is left out: it could be taken out of any order that holds it. One whose value was
 * read has its revision from there. A revision that was seen, but not its value, is a step that takes some write of unknown fate:
 * one that expected this very state, else the one called first of those that expected nothing there, else of those that expected
 * nothing at all; each is of the least use later on.
 */

/** A time span: called, answered (Infinity: never). */
export interface Span {
  readonly from: number
  readonly to: number
  /** What it was, for evidence. */
  readonly what: unknown
}

export interface Write extends Span {
  readonly revision: number
  /** Only at this revision; `null`: only while absent; left out: whatever is there. */
  readonly expected?: number | null
  /** It also deleted the key in the same transaction, so that it ends absent. */
  readonly leavesAbsent?: boolean
}

export interface Read extends Span {
  /** `null`: absent. */
  readonly revision: number | null
}

/** @property at of a deletion in a transaction: when it was asked for. It did nothing if the key was absent then. */
export interface Deletion extends Span {
  readonly expected?: number
  readonly at?: Omit<Span, 'what'>
}

/** A write of unknown fate that nobody read. */
export interface Unseen {
  readonly from: number
  readonly expected?: number | null
}

export interface Register {
  /** All of known revision that took effect. */
  readonly writes: readonly Write[]
  readonly reads: readonly Read[]
  readonly deletions: readonly Deletion[]
  /** Of unknown fate. */
  readonly maybeDeleted: readonly { readonly from: number; readonly expected?: number }[]
  readonly maybeWritten: readonly Unseen[]
  /** Revisions that were seen and are nobody's. */
  readonly phantoms: readonly number[]
}

export type Verdict = { readonly ok: true } | { readonly ok: false; readonly stuck: readonly unknown[]; readonly why: string }

interface Step {
  readonly revision: number
  readonly from: number
  readonly to: number
  readonly expected: number | null | undefined
  readonly leavesAbsent: boolean
  readonly phantom: boolean
  readonly what: unknown
  /** Of this revision, by their calls. */
  readonly reads: readonly Span[]
  /** `readEnds[n]`: the first answer of the reads from the n-th on. */
  readonly readEnds: readonly number[]
  /** Deletions that must be made at this revision: there can be one. */
  readonly deletions: readonly Span[]
}

interface State {
  /** The last write; -1: none. */
  readonly i: number
  readonly present: boolean
  readonly reads: number
  readonly nulls: number
  /** Deletions that were placed, by their numbers: all below `deleted`, and those of `ahead`. */
  readonly deleted: number
  readonly ahead: readonly number[]
  /** How many of unknown fate were used up. */
  readonly maybe: number
  readonly puts: number
  readonly creates: number
  /** Deletions in transactions: all below `inTx` were placed, and of the next ones `marks` says what is decided. */
  readonly inTx: number
  readonly marks: string
}

const NOT_YET = Number.POSITIVE_INFINITY
/** What is decided of a deletion in a transaction. */
const OPEN = 'o'
const WITH_COMMIT = 'c'
const DONE = 'd'

export function linearizable(register: Register): Verdict {
  return new Search(register).run()
}

class Search {
  readonly #steps: readonly Step[]
  /** `#ends[i]`: the first answer of all writes from the i-th on, and of what belongs to their revisions. */
  readonly #ends: readonly number[]
  readonly #nulls: readonly Span[]
  readonly #nullEnds: readonly number[]
  readonly #deletions: readonly Deletion[]
  readonly #deletionEnds: readonly number[]
  readonly #inTx: readonly Deletion[]
  readonly #inTxEnds: readonly number[]
  readonly #maybe: readonly number[]
  readonly #maybeAt: ReadonlyMap<number, number>
  readonly #puts: readonly number[]
  readonly #creates: readonly number[]
  readonly #updates: ReadonlyMap<number, number>
  readonly #impossible: { readonly why: string; readonly stuck: readonly unknown[] } | undefined
  /** What was tried in vain, and how many deletions of unknown fate had been used up then. */
  readonly #tried = new Map<string, number>()
  #farthest: State | undefined

  constructor(register: Register) {
    const byCall = <T extends { readonly from: number }>(spans: readonly T[]) => [...spans].sort((a, b) => a.from - b.from)
    const reads = Map.groupBy(register.reads, ({ revision }) => revision)
    const conditional = Map.groupBy(
      register.deletions.filter(({ expected }) => expected !== undefined),
      ({ expected }) => expected as number,
    )
    const step = (write: Omit<Write, 'what'> & { what: unknown }, phantom: boolean): Step => {
      const own = byCall(reads.get(write.revision) ?? [])
      return {
        revision: write.revision,
        from: write.from,
        to: write.to,
        expected: write.expected,
        leavesAbsent: write.leavesAbsent === true,
        phantom,
        what: write.what,
        reads: own,
        readEnds: firstAnswers(own),
        deletions: conditional.get(write.revision) ?? [],
      }
    }
    this.#steps = [
      ...register.writes.map((write) => step(write, false)),
      ...register.phantoms.map((revision) =>
        step({ revision, from: 0, to: NOT_YET, what: `revision ${revision}, of an unknown write` }, true),
      ),
    ].sort((a, b) => a.revision - b.revision)
    const ends = new Array<number>(this.#steps.length + 1).fill(NOT_YET)
    for (let i = this.#steps.length - 1; i >= 0; i--) {
      const { to, readEnds, deletions } = this.#steps[i] as Step
      ends[i] = Math.min(ends[i + 1] as number, to, readEnds[0] as number, ...deletions.map((deletion) => deletion.to))
    }
    this.#ends = ends
    this.#nulls = byCall(reads.get(null) ?? [])
    this.#nullEnds = firstAnswers(this.#nulls)
    const unconditional = register.deletions.filter(({ expected }) => expected === undefined)
    this.#deletions = byCall(unconditional.filter(({ at }) => at === undefined))
    this.#deletionEnds = firstAnswers(this.#deletions)
    this.#inTx = unconditional.filter(({ at }) => at !== undefined).sort((a, b) => (a.at as Span).from - (b.at as Span).from)
    this.#inTxEnds = firstAnswers(this.#inTx.map(({ at }) => at as Span))
    this.#maybe = register.maybeDeleted
      .filter(({ expected }) => expected === undefined)
      .map(({ from }) => from)
      .sort((a, b) => a - b)
    this.#maybeAt = earliest(register.maybeDeleted)
    this.#puts = register.maybeWritten
      .filter(({ expected }) => expected === undefined)
      .map(({ from }) => from)
      .sort((a, b) => a - b)
    this.#creates = register.maybeWritten
      .filter(({ expected }) => expected === null)
      .map(({ from }) => from)
      .sort((a, b) => a - b)
    this.#updates = earliest(register.maybeWritten)
    this.#impossible = this.#look(reads, conditional)
  }

  /** What no order could explain, said in its own words. */
  #look(reads: Map<number | null, Read[]>, conditional: Map<number, Deletion[]>) {
    const known = new Map<number, Step>()
    for (const step of this.#steps) {
      const other = known.get(step.revision)
      if (other) return { why: `revision ${step.revision} was given twice`, stuck: [other.what, step.what] }
      known.set(step.revision, step)
    }
    for (const [revision, spans] of reads) {
      if (revision === null || known.has(revision)) continue
      return {
        why: `revision ${revision} was read and is that of no write that took effect`,
        stuck: spans.slice(0, 3).map(({ what }) => what),
      }
    }
    for (const [revision, spans] of conditional) {
      if (spans.length > 1) return { why: `revision ${revision} was deleted twice`, stuck: spans.map(({ what }) => what) }
      if (!known.has(revision))
        return { why: `revision ${revision} was deleted and is that of no write that took effect`, stuck: spans.map(({ what }) => what) }
    }
    return undefined
  }

  run(): Verdict {
    if (this.#impossible) return { ok: false, ...this.#impossible }
    const start: State = {
      i: -1,
      present: false,
      reads: 0,
      nulls: 0,
      deleted: 0,
      ahead: [],
      maybe: 0,
      puts: 0,
      creates: 0,
      inTx: 0,
      marks: '',
    }
    const stack: State[] = [this.#settle(start)]
    for (let state = stack.pop(); state; state = stack.pop()) {
      if (this.#isDone(state)) return { ok: true }
      const key = `${state.i} ${state.present} ${state.reads} ${state.nulls} ${state.deleted} ${state.ahead} ${state.puts} ${state.creates} ${state.inTx} ${state.marks}`
      const tried = this.#tried.get(key)
      if (tried !== undefined && tried <= state.maybe) continue
      this.#tried.set(key, state.maybe)
      if (!this.#farthest || isFarther(state, this.#farthest)) this.#farthest = state
      // The last one is tried first: the next write, then what is spent on deletions.
      for (const next of this.#nexts(state).reverse()) stack.push(this.#settle(next))
    }
    return this.#failure()
  }

  /** The first answer to anything that is not placed yet: what was called after it cannot be next. */
  #bound(state: State): number {
    const here = state.present ? (this.#steps[state.i] as Step) : undefined
    let bound = Math.min(
      this.#ends[state.i + 1] as number,
      this.#nullEnds[state.nulls] as number,
      this.#deletionBound(state),
      this.#inTxBound(state),
    )
    if (here) bound = Math.min(bound, here.readEnds[state.reads] as number, ...here.deletions.map(({ to }) => to))
    return bound
  }

  #deletionBound({ deleted, ahead }: State): number {
    const last = ahead.length === 0 ? deleted : (ahead[ahead.length - 1] as number) + 1
    let bound = this.#deletionEnds[last] as number
    for (let n = deleted; n < last; n++) if (!ahead.includes(n)) bound = Math.min(bound, (this.#deletions[n] as Deletion).to)
    return bound
  }

  /** Places the reads that fit. */
  #settle(state: State): State {
    const spans = state.present ? (this.#steps[state.i] as Step).reads : this.#nulls
    let placed = state.present ? state.reads : state.nulls
    let now = state
    while (placed < spans.length && (spans[placed] as Span).from <= this.#bound(now)) {
      placed++
      now = state.present ? { ...now, reads: placed } : { ...now, nulls: placed }
    }
    return now
  }

  #isDone(state: State): boolean {
    return (
      state.i === this.#steps.length - 1 &&
      state.nulls === this.#nulls.length &&
      state.deleted === this.#deletions.length &&
      state.inTx === this.#inTx.length &&
      (!state.present || this.#mayLeave(state))
    )
  }

  /** All that needs this revision has been placed. Its deletion, if there is one, is the only way to leave. */
  #mayLeave(state: State): boolean {
    const { reads, deletions } = this.#steps[state.i] as Step
    return state.reads === reads.length && deletions.length === 0
  }

  #nexts(state: State): State[] {
    const bound = this.#bound(state)
    const nexts: State[] = []
    const written = this.#write(state, bound)
    if (written) nexts.push(written)
    if (state.present) this.#delete(state, bound, nexts)
    else this.#deleteNothing(state, bound, nexts)
    // One whose call must have ended by now did nothing then, or takes effect with its commit.
    for (const [n, { at }, isDecided] of this.#openInTx(state, bound)) {
      if (!isDecided && at?.to === bound) nexts.push(this.#mark(state, n, WITH_COMMIT))
    }
    return nexts
  }

  #write(state: State, bound: number): State | undefined {
    const step = this.#steps[state.i + 1]
    if (!step || step.from > bound || (state.present && !this.#mayLeave(state))) return undefined
    // Nobody can have seen what was gone again with the same commit.
    if (step.leavesAbsent && step.reads.length + step.deletions.length > 0) return undefined
    const here = state.present ? (this.#steps[state.i] as Step).revision : null
    if (step.expected !== undefined && step.expected !== here) return undefined
    let { puts, creates } = state
    if (step.phantom) {
      const update = here === null ? undefined : this.#updates.get(here)
      const create = here === null ? this.#creates[creates] : undefined
      if (update === undefined || update > bound) {
        if (create !== undefined && create <= bound) creates++
        else if ((this.#puts[puts] ?? NOT_YET) <= bound) puts++
        else return undefined
      }
    }
    return { ...state, i: state.i + 1, present: !step.leavesAbsent, reads: 0, puts, creates }
  }

  #delete(state: State, bound: number, nexts: State[]): void {
    const step = this.#steps[state.i] as Step
    if (state.reads < step.reads.length) return
    const [own] = step.deletions
    if (own) {
      if (own.from <= bound) nexts.push({ ...state, present: false })
      return
    }
    const first = this.#firstDeletion(state, bound)
    if (first !== undefined) nexts.push(this.#placed({ ...state, present: false }, first))
    for (const [n, deletion, isDecided] of this.#openInTx(state, bound)) {
      if (isDecided && deletion.from <= bound) nexts.push(this.#mark({ ...state, present: false }, n, DONE))
    }
    const at = this.#maybeAt.get(step.revision)
    const any = this.#maybe[state.maybe]
    if (at !== undefined && at <= bound) nexts.push({ ...state, present: false })
    else if (any !== undefined && any <= bound) nexts.push({ ...state, present: false, maybe: state.maybe + 1 })
  }

  /** A deletion that found nothing. */
  #deleteNothing(state: State, bound: number, nexts: State[]): void {
    const first = this.#firstDeletion(state, bound)
    if (first !== undefined) nexts.push(this.#placed(state, first))
    for (const [n, deletion, isDecided] of this.#openInTx(state, bound)) {
      if ((isDecided ? deletion.from : (deletion.at?.from ?? NOT_YET)) <= bound) nexts.push(this.#mark(state, n, DONE))
    }
  }

  /** Of those that can be made now, the one that was answered first. */
  #firstDeletion(state: State, bound: number): number | undefined {
    let first: number | undefined
    for (let n = state.deleted; n < this.#deletions.length; n++) {
      const deletion = this.#deletions[n] as Deletion
      if (deletion.from > bound) break
      if (state.ahead.includes(n)) continue
      if (first === undefined || deletion.to < (this.#deletions[first] as Deletion).to) first = n
    }
    return first
  }

  /** Those in transactions that are next by their calls, and of each whether it is decided that it takes effect with its commit. */
  *#openInTx({ inTx, marks }: State, bound = NOT_YET): Generator<[number, Deletion, boolean]> {
    const decided = inTx + marks.length
    for (let n = inTx; n < decided; n++) {
      if (marks[n - inTx] !== DONE) yield [n, this.#inTx[n] as Deletion, marks[n - inTx] === WITH_COMMIT]
    }
    for (let n = decided; n < this.#inTx.length; n++) {
      const deletion = this.#inTx[n] as Deletion
      if (deletion.at && deletion.at.from > bound) return
      yield [n, deletion, false]
    }
  }

  /** The first answer to any of them: to the call, until it is decided that it takes effect with the commit. */
  #inTxBound({ inTx, marks }: State): number {
    let bound = this.#inTxEnds[inTx + marks.length] as number
    for (const [k, mark] of [...marks].entries()) {
      const { at, to } = this.#inTx[inTx + k] as Deletion
      if (mark !== DONE) bound = Math.min(bound, mark === WITH_COMMIT || !at ? to : at.to)
    }
    return bound
  }

  #mark(state: State, n: number, mark: string): State {
    const all = state.marks.padEnd(n - state.inTx + 1, OPEN)
    const marks = `${all.slice(0, n - state.inTx)}${mark}${all.slice(n - state.inTx + 1)}`
    const done = marks.length - marks.replace(/^d+/, '').length
    return { ...state, inTx: state.inTx + done, marks: marks.slice(done) }
  }

  #placed(state: State, n: number): State {
    let { deleted } = state
    const ahead = [...state.ahead, n].sort((a, b) => a - b)
    while (ahead[0] === deleted) {
      ahead.shift()
      deleted++
    }
    return { ...state, deleted, ahead }
  }

  #failure(): Verdict {
    const state = this.#farthest as State
    const bound = this.#bound(state)
    const here = state.present ? (this.#steps[state.i] as Step) : undefined
    const left: { what: unknown; to: number }[] = []
    if (here) left.push(...here.reads.slice(state.reads), ...here.deletions)
    for (const step of this.#steps.slice(state.i + 1)) left.push(step, ...step.reads, ...step.deletions)
    left.push(...this.#nulls.slice(state.nulls), ...this.#deletions.filter((_, n) => n >= state.deleted && !state.ahead.includes(n)))
    left.push(...[...this.#openInTx(state)].map(([, deletion]) => deletion))
    const blocking = left.filter(({ to }) => to <= bound || to === NOT_YET).slice(0, 4)
    const next = this.#steps[state.i + 1]
    const stuck = [...new Set([...(here ? [here.what] : []), ...blocking.map(({ what }) => what), ...(next ? [next.what] : [])])]
    const where = here
      ? `at revision ${here.revision}`
      : state.i < 0
        ? 'while it was absent at the start'
        : `while it was absent after revision ${(this.#steps[state.i] as Step).revision}`
    return { ok: false, why: `no order of the calls explains their answers: the best one ends ${where}`, stuck }
  }
}

function firstAnswers(spans: readonly Omit<Span, 'what'>[]): number[] {
  const firsts = new Array<number>(spans.length + 1).fill(NOT_YET)
  for (let n = spans.length - 1; n >= 0; n--) firsts[n] = Math.min(firsts[n + 1] as number, (spans[n] as Span).to)
  return firsts
}

/** By the revision they expect, the first call. */
function earliest(calls: readonly { readonly from: number; readonly expected?: number | null }[]): Map<number, number> {
  const first = new Map<number, number>()
  for (const { from, expected } of calls) {
    if (expected != null) first.set(expected, Math.min(first.get(expected) ?? NOT_YET, from))
  }
  return first
}

function isFarther(a: State, b: State): boolean {
  return a.i !== b.i ? a.i > b.i : a.nulls + a.reads + a.deleted > b.nulls + b.reads + b.deleted
}

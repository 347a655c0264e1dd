/** What the tests of the suite are made of: stages that close what they opened, readers of streams, and bounded waits. */

import assert from 'node:assert/strict'
import { BusError, type BusErrorCode } from '../../core/errors.ts'
import type { Bus, Capabilities, MsgStream, SubscribeOptions } from '../../core/types.ts'

/** The part of a test runner the suite needs: vitest's and node:test's `describe` and `test` both have it. */
export interface ConformanceRunner {
  readonly describe: {
    (name: string, body: () => void): unknown
    /** Runs the tests of the group beside one another. Without it they run one by one. */
    readonly concurrent?: (name: string, body: () => void) => unknown
  }
  readonly test: {
    (name: string, body: () => Promise<void>): unknown
    skip(name: string, body: () => Promise<void>): unknown
  }
}

/** A transaction of the caller's own. */
export interface CallersTransaction<Tx> {
  readonly tx: Tx
  commit(): Promise<void>
  rollback(): Promise<void>
}

/** What the suite asks of a backend. */
export interface ConformanceHarness<Tx = never> {
  readonly name: string
  /** What the backend says of itself; tests skip visibly by it. */
  readonly supports: Capabilities
  /** One more handle on the same store, as another process would have. The suite closes what it opens. */
  connect(options?: { maxPayloadBytes?: number }): Promise<Bus<Tx>>
  /** Where `supports.transactions`: begins a transaction of the caller's own. */
  begin?(): Promise<CallersTransaction<Tx>>
}

/** How long to wait for what must come, in milliseconds. Generous: it is only used up by a failure. */
export const PATIENCE_MS = 8_000
/** How long to look for what must not come. */
export const QUIET_MS = 250
/** Local and server clocks count in whole milliseconds and round apart. */
export const TICK_MS = 5

/** What one test opens, and closes at its end. */
export class Stage<Tx> {
  readonly supports: Capabilities
  readonly #harness: ConformanceHarness<Tx>
  readonly #undo: (() => unknown)[] = []

  constructor(harness: ConformanceHarness<Tx>) {
    this.#harness = harness
    this.supports = harness.supports
  }

  /** One more handle on the store. */
  async open(options?: { maxPayloadBytes?: number }): Promise<Bus<Tx>> {
    const bus = await this.#harness.connect(options)
    this.defer(() => bus.close())
    return bus
  }

  /** Begins a transaction; it is rolled back at the end of the test if nothing else ended it. */
  async begin(): Promise<CallersTransaction<Tx>> {
    assert.ok(this.#harness.begin, 'a harness whose backend supports transactions must be able to begin one')
    const { tx, commit, rollback } = await this.#harness.begin()
    let over = false
    const once = async (end: () => Promise<void>) => {
      if (over) return
      over = true
      await end()
    }
    this.defer(() => once(rollback))
    return { tx, commit: () => once(commit), rollback: () => once(rollback) }
  }

  /** Subscribes and reads. */
  async subscribe(bus: Bus<Tx>, subject: string, durable: string, options?: SubscribeOptions) {
    const stream: MsgStream<Tx> = await bus.pubsub.subscribe(subject, durable, options)
    const reader = new Reader(stream)
    return { stream, reader, next: (withinMs?: number) => reader.next(withinMs), nothing: (forMs?: number) => reader.nothing(forMs) }
  }

  defer(undo: () => unknown): void {
    this.#undo.push(undo)
  }

  async run(body: (stage: Stage<Tx>) => Promise<void>): Promise<void> {
    let failure: { readonly error: unknown } | undefined
    try {
      await body(this)
    } catch (error) {
      failure = { error }
    }
    for (const undo of this.#undo.reverse()) {
      try {
        await within(Promise.resolve(undo()), PATIENCE_MS, 'closing what the test opened')
      } catch (error) {
        failure ??= { error }
      }
    }
    if (failure) throw failure.error
  }
}

export type Body<Tx> = (stage: Stage<Tx>) => Promise<void>
type Flag = { [K in keyof Capabilities]-?: Capabilities[K] extends boolean ? K : never }[keyof Capabilities]

/** What a test may need of a backend. */
type Need = Flag | 'strictFencing' | 'strictJobFencing'

/** A need as it stands in `supports`. */
const MEMBERS: Readonly<Record<string, string>> = { strictFencing: "fencing: 'strict'", strictJobFencing: "jobFencing: 'strict'" }

/** The name of a test that is skipped says why. */
function skippedName(name: string, backend: string, need: Need): string {
  return `${name} (${backend} lacks: ${MEMBERS[need] ?? need})`
}

/** Out of such a name; `undefined`: the suite did not skip it. */
export function whySkipped(skipped: string): { readonly name: string; readonly member: string } | undefined {
  const [, name, member] = /^(.+) \(\S+ lacks: (.+)\)$/.exec(skipped) ?? []
  return name === undefined || member === undefined ? undefined : { name, member }
}

/** Registers tests with the runner. */
export class Suite<Tx> {
  readonly supports: Capabilities
  readonly #runner: ConformanceRunner
  readonly #harness: ConformanceHarness<Tx>

  constructor(runner: ConformanceRunner, harness: ConformanceHarness<Tx>) {
    this.#runner = runner
    this.#harness = harness
    this.supports = harness.supports
  }

  /** Tests that may run beside one another. */
  group(name: string, body: () => void): void {
    const { describe } = this.#runner
    if (describe.concurrent) describe.concurrent(name, body)
    else describe(name, body)
  }

  /** Tests that measure time, and so run alone. */
  alone(name: string, body: () => void): void {
    this.#runner.describe(name, body)
  }

  test(name: string, body: Body<Tx>): void {
    this.#runner.test(name, this.#run(body))
  }

  /** A test of what not every backend can do: skipped visibly where it cannot. */
  where(capability: Need, name: string, body: Body<Tx>): void {
    const can = this.#can(capability)
    if (can) this.test(name, body)
    else this.#runner.test.skip(skippedName(name, this.supports.backend, capability), this.#run(body))
  }

  #can(capability: Need): boolean {
    if (capability === 'strictFencing') return this.supports.fencing === 'strict'
    if (capability === 'strictJobFencing') return (this.supports.jobFencing ?? this.supports.fencing) === 'strict'
    return this.supports[capability]
  }

  /** A test of what a backend answers that cannot: present only there. */
  without(capability: Flag, name: string, body: Body<Tx>): void {
    if (!this.supports[capability]) this.test(name, body)
  }

  #run(body: Body<Tx>): () => Promise<void> {
    return () => new Stage(this.#harness).run(body)
  }
}

/** Reads an async iterable one element at a time; an element asked for in vain is kept for the next asking. */
export class Reader<T> {
  readonly #iterator: AsyncIterator<T>
  #pending: Promise<IteratorResult<T>> | undefined

  constructor(iterable: AsyncIterable<T>) {
    this.#iterator = iterable[Symbol.asyncIterator]()
  }

  /** Asks without waiting: a consumer who stands ready. */
  ask(): Promise<IteratorResult<T>> {
    if (!this.#pending) {
      this.#pending = this.#iterator.next()
      this.#pending.catch(() => {})
    }
    return this.#pending
  }

  async next(withinMs = PATIENCE_MS): Promise<T> {
    const result = await within(this.ask(), withinMs, 'the next element')
    this.#pending = undefined
    assert.ok(!result.done, 'the stream ended although an element was due')
    return result.value
  }

  async take(count: number, withinMs = PATIENCE_MS): Promise<T[]> {
    const taken: T[] = []
    while (taken.length < count) taken.push(await this.next(withinMs))
    return taken
  }

  /** The next element, or `undefined` when none comes in time or the stream has ended. */
  async poll(forMs: number): Promise<T | undefined> {
    const seen = await Promise.race([this.ask(), pause(forMs)])
    return seen === undefined || seen.done ? undefined : this.next()
  }

  /** Observes for a while that nothing comes. */
  async nothing(forMs = QUIET_MS): Promise<void> {
    const seen = await Promise.race([this.ask(), pause(forMs)])
    if (seen === undefined) return
    assert.fail(seen.done ? 'the stream ended' : `nothing was due, but this came: ${describe(seen.value)}`)
  }

  async ended(withinMs = PATIENCE_MS): Promise<void> {
    const result = await within(this.ask(), withinMs, 'the end of the stream')
    this.#pending = undefined
    assert.ok(result.done, result.done ? '' : `the end was due, but this came: ${describe(result.value)}`)
  }
}

/** The next element of whichever reader has one first; the others go on asking. */
export async function firstOf<T>(...readers: Reader<T>[]): Promise<T> {
  const asked = readers.map(async (reader) => {
    await reader.ask()
    return reader
  })
  return (await within(Promise.race(asked), PATIENCE_MS, 'the next element of any reader')).next()
}

function describe(value: unknown): string {
  if (typeof value !== 'object' || value === null) return String(value)
  const { seq, attempt, subject } = value as { seq?: number; attempt?: number; subject?: string }
  return seq === undefined ? JSON.stringify(value) : `message ${seq} on ${subject}, attempt ${attempt}`
}

export function pause(ms: number): Promise<undefined> {
  return new Promise((resolve) => setTimeout(() => resolve(undefined), ms))
}

/** The promise, or a failure that says what did not come. */
export async function within<T>(promise: Promise<T>, ms: number, what: string): Promise<T> {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what} did not come within ${ms} ms`)), ms)
  })
  try {
    return await Promise.race([promise, late])
  } finally {
    clearTimeout(timer)
  }
}

/** Within a second; where the machine has much else to do, within as long as 20 round trips to the store take at the same time. */
export async function withinASecond<T, Tx>(promise: Promise<T>, bus: Bus<Tx>, what: string): Promise<T> {
  let over = false
  const trips = (async () => {
    for (let trip = 0; trip < 20 && !over; trip++) await bus.kv.get('round', 'trip')
  })()
  const late = Promise.all([pause(1_000), trips]).then(() => {
    throw new Error(`${what} did not come within a second`)
  })
  late.catch(() => {})
  try {
    return await Promise.race([promise, late])
  } finally {
    over = true
  }
}

/** Polls until the value is there. */
export async function eventually<T>(look: () => Promise<T | null | undefined | false>, what: string, withinMs = PATIENCE_MS): Promise<T> {
  const deadline = performance.now() + withinMs
  for (;;) {
    const seen = await look()
    if (seen !== null && seen !== undefined && seen !== false) return seen
    if (performance.now() > deadline) assert.fail(`${what} did not come about within ${withinMs} ms`)
    await pause(15)
  }
}

/**
 * The least of several measurements: what the backend takes, without what the machine adds at times. Stops at the first
 * one within the limit.
 */
export async function fastest(limitMs: number, tries: number, measure: () => Promise<number>): Promise<void> {
  const took: number[] = []
  while (took.length < tries) {
    const ms = await measure()
    took.push(Math.round(ms))
    if (ms <= limitMs) return
  }
  assert.fail(`expected at most ${limitMs} ms, the tries took ${took.join(', ')} ms`)
}

export async function timed(action: () => Promise<unknown>): Promise<number> {
  const start = performance.now()
  await action()
  return performance.now() - start
}

/** The rejection, checked: a BusError with the code, a usable message and the fields every one has. */
export async function rejects(promise: Promise<unknown>, code: BusErrorCode, names?: RegExp | string): Promise<BusError> {
  const error = await within(
    promise.then(
      (value) => assert.fail(`expected a rejection with "${code}", but it resolved with ${describe(value)}`),
      (reason: unknown) => reason,
    ),
    PATIENCE_MS,
    `the rejection with "${code}"`,
  )
  assert.ok(error instanceof BusError, `expected a BusError with "${code}", got ${String(error)}`)
  assert.equal(error.code, code, `expected "${code}", got "${error.code}": ${error.message}`)
  assert.ok(error.message.length > 0)
  assert.equal(typeof error.retryable, 'boolean')
  if (names !== undefined) assert.match(error.message, typeof names === 'string' ? new RegExp(`\\b${names}\\b`) : names)
  return error
}

/** Whether it fulfilled; a rejection must have the code. */
export async function succeeds(promise: Promise<unknown>, otherwise: BusErrorCode): Promise<boolean> {
  try {
    await promise
    return true
  } catch (error) {
    assert.ok(error instanceof BusError && error.code === otherwise, `expected success or "${otherwise}", got ${String(error)}`)
    return false
  }
}

let names = 0
const run = Math.random().toString(36).slice(2, 8)

/** A name nobody else uses, valid for queues, durables, buckets, keys and subject tokens. */
export function unique(what: string): string {
  return `${what}-${run}-${++names}`
}

export function text(bytes: Uint8Array): string {
  return new TextDecoder().decode(bytes)
}

/** What comes back is no Buffer: the `slice` of one shares its memory, and strict comparisons tell them apart. */
export function sameBytes(actual: Uint8Array, expected: Uint8Array | string): void {
  assert.equal(Object.getPrototypeOf(actual), Uint8Array.prototype, 'bytes come back as Uint8Array')
  assert.equal(Buffer.from(actual).toString('hex'), Buffer.from(expected as Uint8Array).toString('hex'))
}

export function ascending(numbers: readonly number[]): void {
  for (const [index, number] of numbers.entries()) {
    assert.ok(index === 0 || number > (numbers[index - 1] as number), `expected strictly growing numbers, got ${numbers.join(', ')}`)
  }
}

export function sorted<T>(values: Iterable<T>): T[] {
  return [...values].sort()
}

/** Payloads that a careless encoder spoils. */
export function oddPayloads(): { readonly name: string; readonly payload: Uint8Array | string; readonly bytes: Uint8Array }[] {
  const all = Uint8Array.from({ length: 256 }, (_, index) => index)
  const shared = new Uint8Array(new SharedArrayBuffer(4))
  shared.set([9, 8, 7, 0])
  return [
    { name: 'no bytes', payload: new Uint8Array(0), bytes: new Uint8Array(0) },
    { name: 'an empty string', payload: '', bytes: new Uint8Array(0) },
    { name: 'every byte there is', payload: all, bytes: all },
    { name: 'text beyond ASCII', payload: 'añb 漢字 \u{1f600}\0\\x41', bytes: new TextEncoder().encode('añb 漢字 \u{1f600}\0\\x41') },
    { name: 'a view into a larger buffer', payload: all.subarray(100, 104), bytes: Uint8Array.of(100, 101, 102, 103) },
    { name: 'a Buffer', payload: Buffer.from([0xff, 0xfe, 0]), bytes: Uint8Array.of(0xff, 0xfe, 0) },
    { name: 'shared memory', payload: shared, bytes: Uint8Array.of(9, 8, 7, 0) },
  ]
}

/** Headers that a careless encoder spoils. */
export const ODD_HEADERS: Readonly<Record<string, string>> = Object.freeze(
  Object.fromEntries([
    ['__proto__', 'a header like any other'],
    ['constructor', 'c'],
    ['toString', 't'],
    ['empty', ''],
    ['x-case', 'lower'],
    ['X-Case', 'upper'],
    ['!#$%&\'*+-.^_`|~"(),/;<=>?@[\\]{}', 'odd name'],
    ['quotes', '\' " \\ {} $1 %s NULL'],
    ['unicode', 'naïve 漢字 \u{1f600}'],
    ['tab', 'a\tb'],
  ]),
)

/** Compares headers as own entries, so that `__proto__` counts. */
export function sameHeaders(actual: Readonly<Record<string, string>>, expected: Readonly<Record<string, string>>): void {
  assert.deepEqual(sorted(Object.entries(actual).map(String)), sorted(Object.entries(expected).map(String)))
}

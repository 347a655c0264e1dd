/**
 * Plays a trace in one world. Every call is started and then looked after: what has come to an end by the end of a step
 * is reported with it, in the order in which the calls were made; the others go on into the next steps, as a consumer does who
 * waits for a message.
 */

import {
  BusError,
  type ClaimedJob,
  type KvChange,
  type KvWatch,
  type Lease,
  type Msg,
  type MsgStream,
  type Responder,
} from '../../src/index.ts'
import { Ref, type Seen } from './compare.ts'
import { EVEN_DONE, type Step } from './steps.ts'
import { ALIKE, type Terms } from './terms.ts'
import { type AnyBus, TooSlow, type World } from './worlds.ts'

/** The longest wait that steps.ts draws. */
const LONGEST_WAIT_MS = 60_000

interface Call {
  readonly label: string
  outcome: { readonly value: unknown } | { readonly error: unknown } | undefined
  readonly report: (value: never) => Seen
}

export interface Holding {
  readonly bus: AnyBus
  /** Of what it is one: so that not more than one of them is held when the bus closes. */
  readonly of: string
  settled: boolean
}

export interface HeldStream {
  readonly bus: AnyBus
  readonly durable: string
  readonly stream: MsgStream
  readonly iterator: AsyncIterator<Msg>
  asking: boolean
  over: boolean
}

export interface HeldDelivery extends Holding {
  readonly msg: Msg
}

export interface HeldClaim extends Holding {
  readonly job: ClaimedJob
}

export interface OpenWatch {
  readonly watch: KvWatch
  readonly changes: KvChange[]
  readonly bucket: string
  over: Seen
}

/** What was seen at the end of a step. */
export interface Look {
  readonly step: Seen
  readonly ended: readonly (readonly [string, Seen])[]
  /** Of each watch, how many changes came, and which. */
  readonly counts: readonly number[]
  readonly changes: readonly Seen[]
  readonly over: readonly Seen[]
  readonly signals: readonly boolean[]
}

export type Perform = (player: Player, step: never, n: number, hint: Seen | undefined) => unknown

export class Player {
  readonly world: World
  readonly terms: Terms
  readonly streams: HeldStream[] = []
  readonly deliveries: HeldDelivery[] = []
  readonly claims: HeldClaim[] = []
  readonly leases: { readonly lease: Lease; readonly scope: string; released: boolean }[] = []
  readonly watches: OpenWatch[] = []
  readonly responders: { readonly responder: Responder; open: boolean }[] = []
  readonly seqs: number[] = []
  readonly jobIds: string[] = []
  /** Messages were. */
  purged = false
  /** Queues that promise no order any more. */
  readonly unordered = new Set<string>()
  /** A durable was to begin at a time that is still to come. */
  ahead = false
  readonly revisions = new Map<string, number[]>()
  /** How many handlers have begun that end only when they are told to. */
  handling = 0
  /** What somebody waits for: at most one at a time, for nothing is promised between two. */
  readonly awaited = new Set<string>()
  /** The latest that was closed. */
  closed: AnyBus | undefined
  readonly #actions: Readonly<Record<Step['do'], Perform>>
  readonly #buses: (AnyBus | undefined)[] = []
  readonly #calls: Call[] = []
  readonly #wrap: (bus: AnyBus) => AnyBus

  /** @param wrap what stands between the trace and a bus */
  constructor(
    world: World,
    actions: Readonly<Record<Step['do'], Perform>>,
    { terms = ALIKE, wrap = (bus) => bus }: { readonly terms?: Terms; readonly wrap?: (bus: AnyBus) => AnyBus } = {},
  ) {
    this.world = world
    this.terms = terms
    this.#actions = actions
    this.#wrap = wrap
  }

  /** @param hint what was seen in the other world: what came to an end there is waited for */
  async play(step: Step, n: number, hint?: Look): Promise<Look> {
    const seen = (await this.#actions[step.do](this, step as never, n, hint?.step)) as Seen | undefined
    await this.world.rest()
    return this.#look(seen ?? null, hint)
  }

  async bus(which: number): Promise<AnyBus> {
    const bus = this.#buses[which] ?? this.#wrap(await this.world.open())
    this.#buses[which] = bus
    return bus
  }

  async closeBus(which: number): Promise<boolean> {
    const bus = this.#buses[which]
    if (!bus) return false
    // What comes back together comes in no promised order.
    for (const { msg } of allButOne(this.deliveries, bus)) await msg.ack().catch(unlessRefused)
    for (const { job } of allButOne(this.claims, bus)) await job.ack().catch(unlessRefused)
    await this.world.close(bus)
    this.#buses[which] = undefined
    this.closed = bus
    return true
  }

  start<T>(label: string, promise: Promise<T>, report: (value: T) => Seen): void {
    this.#calls.push(observed(label, promise, report))
  }

  /** What it has come to when nothing is under way any more. @param pending that it is so in the other world */
  async soFar<T>(promise: Promise<T>, report: (value: T) => Seen, pending: boolean): Promise<Seen> {
    const call = observed('', promise, report)
    await this.world.until(() => call.outcome !== undefined, !pending)
    return call.outcome === undefined ? 'nothing yet' : shown(call)
  }

  /** @param back 0: the latest */
  pick<T>(from: readonly T[], back: number): T | undefined {
    return from[from.length - 1 - (back % Math.max(1, from.length))]
  }

  /** Rather one that is not done with. */
  pickOpen<T>(from: readonly T[], back: number, done: (one: T) => boolean): T | undefined {
    const open = back >= EVEN_DONE ? [] : from.filter((one) => !done(one))
    return this.pick(open.length > 0 ? open : from, back)
  }

  revision(scope: string, value: number): Ref {
    const known = this.revisions.get(scope) ?? []
    this.revisions.set(scope, known)
    if (known.at(-1) !== value && !known.includes(value)) known.push(value)
    return new Ref(scope, value)
  }

  async advance(ms: number): Promise<void> {
    await this.world.advance(ms, this.awaited.size > 0 ? LONGEST_WAIT_MS : 0)
  }

  async end(): Promise<void> {
    for (const bus of this.#buses) {
      try {
        if (bus) await this.world.close(bus)
      } catch (error) {
        if (!(error instanceof TooSlow)) throw error
      }
    }
  }

  /** The changes of a key are in order; those of several keys are in none. */
  #changesOf({ bucket, changes }: OpenWatch): Seen {
    const byKey = Map.groupBy(changes.splice(0), (change) => (change.operation === 'put' ? change.entry.key : change.key))
    const seen = [...byKey].map(([key, ofKey]): [string, Seen] => [
      key,
      ofKey.map((change) =>
        change.operation === 'put'
          ? { put: text(change.entry.value), revision: this.revision(`${bucket}/${key}`, change.entry.revision) }
          : { delete: new Ref(`${bucket}/${key}`, change.revision) },
      ),
    ])
    return Object.fromEntries(seen)
  }

  async #look(step: Seen, hint: Look | undefined): Promise<Look> {
    if (hint) {
      const due = new Set(hint.ended.map(([label]) => label))
      await this.world.until(() => this.#calls.every(({ label, outcome }) => outcome !== undefined || !due.has(label)), true)
      await this.world.until(() => hint.counts.every((count, index) => count <= (this.watches[index]?.changes.length ?? 0)), true)
      await this.world.rest()
    }
    const ended = this.#calls.filter(({ outcome }) => outcome !== undefined)
    for (const call of ended) this.#calls.splice(this.#calls.indexOf(call), 1)
    return {
      step,
      ended: ended.map((call) => [call.label, shown(call)] as const),
      counts: this.watches.map(({ changes }) => changes.length),
      changes: this.watches.map((watch) => this.#changesOf(watch)),
      over: this.watches.map(({ over }) => over),
      signals: [...this.leases.map(({ lease }) => lease.signal.aborted), ...this.claims.map(({ job }) => job.lease.signal.aborted)],
    }
  }
}

function unlessRefused(error: unknown): void {
  if (!(error instanceof BusError)) throw error
}

/** What is held of each but the first. */
function allButOne<T extends Holding>(holdings: readonly T[], bus: AnyBus): T[] {
  const held = holdings.filter((one) => one.bus === bus && !one.settled)
  const surplus = held.filter((one, index) => held.findIndex((other) => other.of === one.of) < index)
  for (const one of surplus) one.settled = true
  return surplus
}

function observed<T>(label: string, promise: Promise<T>, report: (value: T) => Seen): Call {
  const call: Call = { label, outcome: undefined, report }
  promise.then(
    (value) => {
      call.outcome = { value }
    },
    (error) => {
      call.outcome = { error }
    },
  )
  return call
}

function shown({ outcome, report }: Call): Seen {
  if (outcome && 'value' in outcome) return { ok: report(outcome.value as never) }
  return refusal(outcome?.error)
}

function refusal(error: unknown): Seen {
  if (!(error instanceof BusError)) return { error: `no BusError: ${String(error)}` }
  const { code, retryable, message, expected, actual } = error
  // The text of a refused argument names it and its rule, and a failed handler's is its own; of the others only the code is promised.
  const text = code === 'invalid_argument' || code === 'payload_too_large' || code === 'handler_failed' ? { text: message } : {}
  const revisions =
    code === 'cas_conflict'
      ? {
          expected: expected === null ? null : new Ref('revision', expected as number, false),
          actual: actual === null ? null : new Ref('revision', actual as number, false),
        }
      : {}
  return { error: code, retryable, ...text, ...revisions }
}

export function text(bytes: Uint8Array): string {
  return new TextDecoder().decode(bytes)
}

export async function collected<T>(elements: AsyncIterable<T>): Promise<T[]> {
  const all: T[] = []
  for await (const element of elements) all.push(element)
  return all
}

/** What a trace is made of, as data that fast-check draws and shrinks. What a step refers to is counted back from the latest. */

import fc from 'fast-check'
import { GRAIN_MS } from './worlds.ts'

export const SUBJECTS = ['s.a', 's.b!{}"$\\', 's.a.x', 't'] as const
export const FILTERS = ['s.>', 's.*', 't', '*.a', 's.a', '*.*.x'] as const
export const DURABLES = ['d0', 'D-1_x'] as const
export const QUEUES = ['q0', 'q.1-X_y'] as const
export const BUCKETS = ['b', 'c.D_-1'] as const
export const KEYS = ['k', 'k.x', '=k/Y_-'] as const
export const KEY_FILTERS = ['k', 'k.*', '>', '*'] as const
export const ASKED = ['r.a', 'r.b', 'u'] as const
export const ANSWERED = ['r.*', 'r.a', 'u', 'r.>'] as const
export const HEADERS: readonly (Readonly<Record<string, string>> | undefined)[] = [
  undefined,
  { a: 'b', A: ' c ', see: 'the Nats-Msg-Id' },
  Object.fromEntries([
    ['x-y', 'ü 漢'],
    ['e', ''],
    ['__proto__', 'p'],
    ['Nats-Msg-Id', 'no id'],
    ['klieo-headers', '{}'],
    ['!#$%&\'*+-.^_`|~"(),/;<=>?@[\\]{}', 'tab\tquotes " \\ \''],
  ]),
]
export const IDS = ['i0', 'i1', ' odd \n id'] as const

export const REASONS = ['not wanted', 'ü\nodd', 'r'.repeat(2_000)] as const

export type Start = 'all' | 'new' | { readonly seq: number } | { readonly agoMs: number }

export interface JobSpec {
  readonly headers: number
  readonly dedupKey?: number
  readonly maxAttempts?: number
  readonly delayMs?: number
  /** `runAt`, from now. */
  readonly inMs?: number
  readonly priority?: number
}

export type Step =
  | { readonly do: 'publish'; readonly bus: number; readonly subject: number; readonly headers: number; readonly msgId?: number }
  | {
      readonly do: 'publishMany'
      readonly bus: number
      readonly messages: readonly { readonly subject: number; readonly headers: number; readonly msgId?: number }[]
    }
  | {
      readonly do: 'subscribe'
      readonly bus: number
      readonly durable: number
      readonly filter: number
      readonly start: Start
      readonly ackWaitMs: number
      readonly maxDeliver?: number
      readonly maxAckPending?: number
    }
  | { readonly do: 'read'; readonly stream: number }
  | { readonly do: 'settle'; readonly delivery: number; readonly how: 'ack' | 'nak' | 'term' | 'extend'; readonly delayMs: number }
  | { readonly do: 'closeStream'; readonly stream: number }
  | { readonly do: 'deleteDurable'; readonly bus: number; readonly durable: number }
  | { readonly do: 'consume'; readonly bus: number; readonly durable: number; readonly filter: number }
  | { readonly do: 'letters'; readonly bus: number }
  | { readonly do: 'enqueue'; readonly bus: number; readonly queue: number; readonly job: JobSpec }
  | { readonly do: 'enqueueMany'; readonly bus: number; readonly queue: number; readonly jobs: readonly JobSpec[] }
  | {
      readonly do: 'claim'
      readonly bus: number
      readonly queue: number
      readonly ttlMs: number
      readonly limit: number
      readonly waitMs: number
    }
  | {
      readonly do: 'settleJob'
      readonly claim: number
      readonly how: 'ack' | 'nak' | 'nakLater' | 'deadLetter' | 'heartbeat' | 'leaseHeartbeat' | 'release'
      readonly delayMs: number
    }
  | { readonly do: 'record'; readonly bus: number; readonly queue: number; readonly key: number; readonly how: 'get' | 'delete' | 'keys' }
  | { readonly do: 'put'; readonly bus: number; readonly bucket: number; readonly key: number; readonly ttlMs?: number }
  | {
      readonly do: 'cas'
      readonly bus: number
      readonly bucket: number
      readonly key: number
      readonly expected: number | null
      readonly ttlMs?: number
    }
  | { readonly do: 'delete'; readonly bus: number; readonly bucket: number; readonly key: number; readonly expected?: number }
  | { readonly do: 'get'; readonly bus: number; readonly bucket: number; readonly key: number }
  | { readonly do: 'keys'; readonly bus: number; readonly bucket: number; readonly filter?: number }
  | { readonly do: 'watch'; readonly bus: number; readonly bucket: number; readonly filter?: number; readonly updatesOnly: boolean }
  | { readonly do: 'closeWatch'; readonly watch: number }
  | {
      readonly do: 'lease'
      readonly bus: number
      readonly bucket: number
      readonly key: number
      readonly ttlMs: number
      readonly waitMs: number
    }
  | { readonly do: 'settleLease'; readonly lease: number; readonly how: 'heartbeat' | 'release' }
  | { readonly do: 'respond'; readonly bus: number; readonly subject: number; readonly concurrency: number }
  | { readonly do: 'closeResponder'; readonly responder: number }
  | {
      readonly do: 'request'
      readonly bus: number
      readonly subject: number
      readonly headers: number
      readonly kind: 'echo' | 'empty' | 'throw' | 'wrong' | 'hang'
      /** What ends one that hangs. */
      readonly end: 'time' | 'close'
    }
  | {
      readonly do: 'jobAdmin'
      readonly bus: number
      readonly job: number
      readonly how: 'look' | 'retry' | 'cancel' | 'remove'
      readonly reason?: number
    }
  | {
      readonly do: 'queueAdmin'
      readonly bus: number
      readonly queue: number
      readonly how: 'list' | 'retryDead' | 'purge' | 'pause' | 'resume'
      readonly states?: readonly ('ready' | 'scheduled' | 'dead')[]
    }
  | { readonly do: 'seek'; readonly bus: number; readonly durable: number; readonly start: Start }
  | { readonly do: 'purgeMessages'; readonly bus: number; readonly filter: number; readonly agoMs?: number }
  | { readonly do: 'overview'; readonly bus: number }
  | { readonly do: 'misuse'; readonly bus: number; readonly call: number; readonly values: readonly number[] }
  | { readonly do: 'advance'; readonly ms: number }
  | { readonly do: 'closeBus'; readonly bus: number }

export type Area = 'pubsub' | 'jobs' | 'kv' | 'requests' | 'admin' | 'everything'

type Weighted = { readonly weight: number; readonly arbitrary: fc.Arbitrary<Step> }

const of = (items: readonly unknown[]) => fc.nat({ max: items.length - 1 })
const back = fc.oneof(
  { weight: 3, arbitrary: fc.constant(0) },
  { weight: 2, arbitrary: fc.constant(1) },
  { weight: 2, arbitrary: fc.nat({ max: 6 }) },
)
const bus = fc.nat({ max: 1 })
const grains = (...counts: number[]) => fc.constantFrom(...counts.map((count) => count * GRAIN_MS))
/** Half of an ack wait is a multiple of the grain, too: after it a message goes back that nobody asked for. */
const ackWaits = grains(2, 2, 2, 6, 12, 60)
const ttls = fc.oneof({ weight: 12, arbitrary: grains(1, 1, 3, 3, 6, 12, 60) }, { weight: 1, arbitrary: fc.constant(0) })
const delays = grains(0, 0, 1, 3, 12)
const HOUR = 60 * 60 * 1_000

/** So far back what is done with counts, too; else only what is still open. */
export const EVEN_DONE = 4

/** Optional fields are absent where nothing is drawn. */
function step(model: Record<string, fc.Arbitrary<unknown>>, optional: readonly string[] = []): fc.Arbitrary<Step> {
  const requiredKeys = Object.keys(model).filter((key) => !optional.includes(key))
  return fc.record(model, { requiredKeys }) as fc.Arbitrary<unknown> as fc.Arbitrary<Step>
}

const named = (name: Step['do']) => fc.constant(name)
const subject = fc.oneof({ weight: 3, arbitrary: fc.constant(0) }, { weight: 2, arbitrary: of(SUBJECTS) })
const message = { subject, headers: of(HEADERS), msgId: of(IDS) }
const start = fc.oneof(
  { weight: 4, arbitrary: fc.constant<Start>('all') },
  { weight: 1, arbitrary: fc.constant<Start>('new') },
  { weight: 1, arbitrary: fc.record({ seq: fc.nat({ max: 4 }) }) },
  { weight: 1, arbitrary: fc.record({ agoMs: fc.constantFrom(-15_000, 15_000, 45_000) }) },
)
const few = fc.integer({ min: 1, max: 3 })
const job = fc
  .record(
    {
      headers: of(HEADERS),
      dedupKey: of(IDS),
      maxAttempts: few,
      delayMs: delays,
      // Not at the same time as anything else, so that which comes first does not hang on milliseconds.
      inMs: fc.constantFrom(-1_000, 50_000, 110_000),
      priority: fc.constantFrom(-100, -1, 0, 0, 1, 100),
    },
    { requiredKeys: ['headers'] },
  )
  .map((spec): JobSpec => {
    if (spec.delayMs === undefined || spec.inMs === undefined) return spec as JobSpec
    const { inMs: _, ...rest } = spec
    return rest as JobSpec
  })

const TIME: Weighted = {
  weight: 16,
  arbitrary: fc.oneof(
    { weight: 30, arbitrary: step({ do: named('advance'), ms: grains(1, 1, 2, 2, 3, 6, 12) }) },
    { weight: 1, arbitrary: step({ do: named('advance'), ms: fc.constantFrom(20 * GRAIN_MS, 25 * HOUR) }) },
  ),
}
const CLOSE_BUS: Weighted = { weight: 1, arbitrary: step({ do: named('closeBus'), bus }) }
const LETTERS: Weighted = { weight: 4, arbitrary: step({ do: named('letters'), bus }) }

const PUBSUB: Weighted[] = [
  { weight: 24, arbitrary: step({ do: named('publish'), bus, ...message }, ['msgId']) },
  {
    weight: 8,
    arbitrary: step({
      do: named('publishMany'),
      bus,
      messages: fc.array(fc.record(message, { requiredKeys: ['subject', 'headers'] }), { maxLength: 5 }),
    }),
  },
  {
    weight: 10,
    arbitrary: step(
      {
        do: named('subscribe'),
        bus,
        durable: fc.constantFrom(0, 0, 1),
        filter: fc.oneof({ weight: 8, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: of(FILTERS) }),
        start,
        ackWaitMs: ackWaits,
        maxDeliver: few,
        maxAckPending: few,
      },
      ['maxDeliver', 'maxAckPending'],
    ),
  },
  { weight: 40, arbitrary: step({ do: named('read'), stream: back }) },
  {
    weight: 34,
    arbitrary: step({
      do: named('settle'),
      delivery: back,
      how: fc.constantFrom('ack', 'ack', 'nak', 'nak', 'term', 'extend'),
      delayMs: delays,
    }),
  },
  { weight: 2, arbitrary: step({ do: named('closeStream'), stream: back }) },
  { weight: 1, arbitrary: step({ do: named('deleteDurable'), bus, durable: of(DURABLES) }) },
  { weight: 2, arbitrary: step({ do: named('consume'), bus, durable: of(DURABLES), filter: fc.constant(0) }) },
  LETTERS,
]

const JOBS: Weighted[] = [
  { weight: 20, arbitrary: step({ do: named('enqueue'), bus, queue: fc.constantFrom(0, 0, 0, 1), job }) },
  {
    weight: 8,
    arbitrary: step({ do: named('enqueueMany'), bus, queue: fc.constantFrom(0, 0, 0, 1), jobs: fc.array(job, { maxLength: 5 }) }),
  },
  {
    weight: 30,
    arbitrary: step({
      do: named('claim'),
      bus,
      queue: fc.constantFrom(0, 0, 0, 1),
      ttlMs: ttls,
      limit: fc.constantFrom(0, 0, 1, 2, 5),
      waitMs: fc.constantFrom(0, 0, 0, 0, GRAIN_MS),
    }),
  },
  {
    weight: 30,
    arbitrary: step({
      do: named('settleJob'),
      claim: back,
      how: fc.constantFrom('ack', 'ack', 'nak', 'nak', 'nakLater', 'deadLetter', 'heartbeat', 'leaseHeartbeat', 'release'),
      delayMs: delays,
    }),
  },
  {
    weight: 4,
    arbitrary: step({
      do: named('record'),
      bus,
      queue: fc.constantFrom(0, 0, 0, 1),
      key: of(IDS),
      how: fc.constantFrom('get', 'delete', 'keys'),
    }),
  },
  LETTERS,
]

const key = { bus, bucket: of(BUCKETS), key: of(KEYS) }
/** 9 is a revision that never was. */
const expected = fc.oneof({ weight: 3, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: fc.constantFrom(1, 2, 9) })
const KV: Weighted[] = [
  { weight: 14, arbitrary: step({ do: named('put'), ...key, ttlMs: grains(1, 3, 12) }, ['ttlMs']) },
  {
    weight: 14,
    arbitrary: step({ do: named('cas'), ...key, expected: fc.oneof(expected, fc.constant(null)), ttlMs: grains(1, 3, 12) }, ['ttlMs']),
  },
  { weight: 8, arbitrary: step({ do: named('delete'), ...key, expected }, ['expected']) },
  { weight: 10, arbitrary: step({ do: named('get'), ...key }) },
  { weight: 5, arbitrary: step({ do: named('keys'), bus, bucket: of(BUCKETS), filter: of(KEY_FILTERS) }, ['filter']) },
  {
    weight: 5,
    arbitrary: step({ do: named('watch'), bus, bucket: of(BUCKETS), filter: of(KEY_FILTERS), updatesOnly: fc.boolean() }, ['filter']),
  },
  { weight: 2, arbitrary: step({ do: named('closeWatch'), watch: back }) },
  { weight: 16, arbitrary: step({ do: named('lease'), ...key, ttlMs: ttls, waitMs: fc.constantFrom(0, 0, 0, GRAIN_MS, 2 * GRAIN_MS) }) },
  { weight: 16, arbitrary: step({ do: named('settleLease'), lease: back, how: fc.constantFrom('heartbeat', 'heartbeat', 'release') }) },
]

const REQUESTS: Weighted[] = [
  { weight: 8, arbitrary: step({ do: named('respond'), bus, subject: of(ANSWERED), concurrency: few }) },
  { weight: 3, arbitrary: step({ do: named('closeResponder'), responder: back }) },
  {
    weight: 16,
    arbitrary: step({
      do: named('request'),
      bus,
      subject: of(ASKED),
      headers: of(HEADERS),
      kind: fc.constantFrom('echo', 'echo', 'empty', 'throw', 'wrong', 'hang'),
      end: fc.constantFrom('time', 'close'),
    }),
  },
]

const ADMIN: Weighted[] = [
  {
    weight: 16,
    arbitrary: step(
      {
        do: named('jobAdmin'),
        bus,
        job: back,
        how: fc.constantFrom('look', 'look', 'retry', 'retry', 'cancel', 'cancel', 'remove'),
        reason: of(REASONS),
      },
      ['reason'],
    ),
  },
  {
    weight: 16,
    arbitrary: step(
      {
        do: named('queueAdmin'),
        bus,
        queue: fc.constantFrom(0, 0, 0, 1),
        how: fc.constantFrom('list', 'list', 'list', 'retryDead', 'retryDead', 'purge', 'pause', 'resume', 'resume'),
        states: fc.subarray(['ready', 'scheduled', 'dead']),
      },
      ['states'],
    ),
  },
  { weight: 6, arbitrary: step({ do: named('seek'), bus, durable: fc.constantFrom(0, 0, 1), start }) },
  {
    weight: 4,
    arbitrary: step({ do: named('purgeMessages'), bus, filter: of(FILTERS), agoMs: fc.constantFrom(-15_000, 15_000, 45_000) }, ['agoMs']),
  },
  { weight: 8, arbitrary: step({ do: named('overview'), bus }) },
]

const MISUSE: Weighted = {
  weight: 4,
  arbitrary: step({
    do: named('misuse'),
    bus,
    call: fc.nat({ max: 99 }),
    values: fc.array(fc.nat({ max: 99 }), { minLength: 5, maxLength: 5 }),
  }),
}

const STEPS: Readonly<Record<Area, readonly Weighted[]>> = {
  pubsub: [...PUBSUB, TIME, CLOSE_BUS, MISUSE],
  jobs: [...JOBS, TIME, CLOSE_BUS, MISUSE],
  kv: [...KV, TIME, CLOSE_BUS, MISUSE],
  requests: [...REQUESTS, { ...TIME, weight: 2 }, CLOSE_BUS, MISUSE],
  admin: [...ADMIN, ...ADMIN, ...PUBSUB, ...JOBS, TIME, CLOSE_BUS],
  everything: [...PUBSUB, ...JOBS, ...KV, ...REQUESTS, ...ADMIN, TIME, CLOSE_BUS, MISUSE],
}

/** What most traces need something of before anything can happen. */
const OPENINGS: Readonly<Record<Area, readonly Step['do'][]>> = {
  pubsub: ['subscribe'],
  jobs: ['enqueueMany'],
  kv: ['watch', 'lease'],
  requests: ['respond'],
  admin: ['subscribe', 'enqueueMany'],
  everything: ['subscribe', 'enqueueMany', 'watch', 'respond'],
}

export function traces(area: Area, maxLength: number): fc.Arbitrary<Step[]> {
  const steps = fc.oneof(...STEPS[area])
  const opening = steps.filter((one) => OPENINGS[area].includes(one.do))
  return (
    fc
      .tuple(fc.array(opening, { maxLength: 3, size: 'max' }), fc.array(steps, { minLength: 1, maxLength, size: 'max' }))
      // Last of all the dead letters are read, so that none is lost unseen.
      .map(([first, rest]) => [...first, ...rest, { do: 'letters', bus: 0 }])
  )
}

/** Calls with arguments at random, most of them wrong: which one is refused, and how. Where none is, nothing that a trace looks at is touched. */

import type { Headers, Job, Message, Payload } from '../../src/index.ts'
import type { Seen } from './compare.ts'
import { collected, type Player } from './player.ts'
import type { Step } from './steps.ts'
import type { AnyBus } from './worlds.ts'

const FINE_MS = 20_000

// The first of each is right.
const subjects: unknown[] = [
  'junk.x',
  '',
  '.',
  'a..b',
  'a.',
  '.a',
  '*',
  'a*',
  'a.>',
  'a b',
  'a\n',
  'a\0',
  'ü',
  '$x',
  '_INBOX.x',
  5,
  null,
  undefined,
  's'.repeat(1025),
  {},
]
const filters: unknown[] = ['junk.x', '', 'a..b', 'a.', 'a*', '>.a', 'a b', '_INBOX.>', '$x', 5, null, 's'.repeat(1025)]
const payloads: unknown[] = [
  'x',
  undefined,
  null,
  5,
  {},
  [],
  'lone \ud800',
  new Uint8Array(1_048_577),
  'ä'.repeat(524_289),
  new ArrayBuffer(1),
]
const headers: unknown[] = [
  { ok: 'y' },
  undefined,
  null,
  'x',
  [],
  new Map(),
  { 'a b': 'x' },
  { 'a:': 'x' },
  { '': 'x' },
  { a: '\n' },
  { a: 5 },
  { a: '\ud800' },
  { a: 'x'.repeat(65_536) },
]
const ids: unknown[] = ['fine', undefined, '', 'x'.repeat(513), 'a\0', '\udc00', 5, null, {}]
const durations: unknown[] = [FINE_MS, 0, -1, 0.5, Number.NaN, Number.POSITIVE_INFINITY, 2_147_483_648, '1', null, {}, 10n]
const counts: unknown[] = [1, 0, -1, 1.5, Number.NaN, 1e10, '1', null, {}]
const names: unknown[] = ['junk', '', '.', 'a..b', 'a.', 'a b', 'ü', 'a*', 'n'.repeat(129), 5, null, undefined]
const keys: unknown[] = ['junk', '', '.', 'a..b', 'a.', 'a b', 'ü', 'a*', 'k'.repeat(513), 5, null, undefined]
const revisions: unknown[] = [null, 999_999_999, 0, -1, 0.5, Number.NaN, '1', undefined, 2 ** 53]
const bags: unknown[] = [undefined, {}, null, 5, 'x', [], { query: () => {} }]
const starts: unknown[] = [
  'all',
  'new',
  'old',
  null,
  5,
  {},
  { seq: -1 },
  { seq: 0.5 },
  { time: new Date(Number.NaN) },
  { time: 5 },
  { seq: 1, time: new Date() },
]
const signals: unknown[] = [undefined, null, 5, {}, new EventTarget()]
const priorities: unknown[] = [0, 101, -101, 0.5, '1', null]
const dates: unknown[] = [undefined, new Date(0), new Date(Number.NaN), 5, 'x', null, new Date(-1e15)]
const texts: unknown[] = ['said', '', 'a\0', '\ud800', 5, null]

type Draw = <T>(from: readonly unknown[]) => T
type Misuse = (bus: AnyBus, draw: Draw, player: Player) => Promise<unknown> | undefined

const CALLS: readonly Misuse[] = [
  (bus, draw) => bus.pubsub.publish(draw(subjects), draw(payloads), { headers: draw(headers), msgId: draw(ids) }),
  (bus, draw) => bus.pubsub.publish(draw(subjects), draw(payloads), draw(bags)),
  (bus, draw) =>
    bus.pubsub.publishMany(
      [
        { subject: 'junk.x', payload: 'x' },
        { subject: draw<string>(subjects), payload: draw<Payload>(payloads), headers: draw<Headers>(headers), msgId: draw<string>(ids) },
      ],
      draw(bags),
    ),
  (bus, draw) => bus.pubsub.publishMany(draw<Message[]>([[], null, 5, {}, 'x', [null], [5], ['x']])),
  async (bus, draw) =>
    (
      await bus.pubsub.subscribe(draw(filters), draw([...names, 'a.b']), {
        ackWaitMs: draw(durations),
        start: draw(starts),
        signal: draw(signals),
      })
    ).close(),
  async (bus, draw) =>
    (
      await bus.pubsub.subscribe(draw(filters), draw(names), {
        maxDeliver: draw(counts),
        maxAckPending: draw(counts),
        maxInFlight: draw(counts),
      })
    ).close(),
  async (bus, draw) => (await bus.pubsub.subscribe(draw(filters), draw(names), draw(bags))).close(),
  (bus, draw) => bus.pubsub.deleteDurable(draw([...names, 'a.b', 'nobody'])),
  (bus, draw) =>
    bus.requestReply.request(draw(subjects), draw(payloads), { timeoutMs: draw(durations), headers: draw(headers), signal: draw(signals) }),
  (bus, draw) => bus.requestReply.request(draw(subjects), draw(payloads), draw(bags)),
  async (bus, draw) => (await bus.requestReply.respond(draw(filters), draw([() => 'x', null, 'x', {}, undefined]), draw(bags))).close(),
  async (bus, draw) => (await bus.requestReply.respond(draw(filters), () => 'x', { concurrency: draw([...counts, 10_001]) })).close(),
  (bus, draw) => bus.kv.get(draw([...names, 'dedup.', 'dedup.a b', 'dedup.q']), draw(keys)),
  (bus, draw) => bus.kv.put(draw([...names, 'dedup.q']), draw(keys), draw(payloads), { ttlMs: draw(durations) }),
  (bus, draw) => bus.kv.put(draw([...names, 'dedup.q']), draw(keys), draw(payloads), draw(bags)),
  (bus, draw) => bus.kv.cas(draw([...names, 'dedup.q']), draw(keys), draw(payloads), draw(revisions), { ttlMs: draw(durations) }),
  (bus, draw) => bus.kv.delete(draw(names), draw(keys), { expected: draw(revisions) }),
  (bus, draw) => bus.kv.delete(draw([...names, 'dedup.', 'dedup.a..b']), draw(keys), draw(bags)),
  (bus, draw) => collected(bus.kv.keys(draw(names), draw(filters))),
  async (bus, draw) => (await bus.kv.watch(draw(names), draw(filters), { signal: draw(signals) })).close(),
  async (bus, draw) => (await bus.kv.watch(draw(names), draw(filters), draw(bags))).close(),
  async (bus, draw) =>
    (
      await bus.kv.lease(draw([...names, 'dedup.q']), draw(keys), draw(durations), {
        waitMs: draw([0, ...durations.slice(2)]),
        signal: draw(signals),
      })
    ).release(),
  async (bus, draw) => (await bus.kv.lease(draw(names), draw(keys), draw(durations), draw(bags))).release(),
  (bus, draw) => bus.jobs.enqueue(draw(names), job(draw), draw(bags)),
  (bus, draw) => bus.jobs.enqueue(draw(names), draw([{ payload: 'x' }, null, undefined, 5, 'x', {}, []])),
  (bus, draw) => bus.jobs.enqueueMany(draw(names), [{ payload: 'x' }, job(draw)], draw(bags)),
  (bus, draw) => bus.jobs.enqueueMany(draw(names), draw<Job[]>([[], null, 5, {}, 'x', [null], [5]]), draw(bags)),
  (bus, draw) =>
    bus.jobs.claim(draw(names), draw(ids.toSpliced(1, 1)), draw(durations), {
      waitMs: draw([0, ...durations.slice(2), 30_001]),
      signal: draw(signals),
    }),
  (bus, draw) => bus.jobs.claim(draw(names), draw(ids), draw(durations), draw(bags)),
  (bus, draw) =>
    bus.jobs.claimMany(draw(names), draw(ids), draw(durations), {
      limit: draw([...counts, 1_001, undefined]),
      waitMs: draw([0, ...durations.slice(2), 30_001]),
    }),
  (bus, draw) => bus.jobs.claimMany(draw(names), draw(ids), draw(durations), draw(bags)),
  (_bus, draw, player) => player.pick(player.deliveries, 0)?.msg.nak(draw(durations.slice(2))),
  (_bus, draw, player) => player.pick(player.deliveries, 0)?.msg.term(draw(texts.slice(2))),
  (_bus, draw, player) => player.pick(player.deliveries, 0)?.msg.ack(draw(bags.slice(2))),
  (_bus, draw, player) => player.pick(player.claims, 0)?.job.nak(draw(durations.slice(2))),
  (_bus, draw, player) => player.pick(player.claims, 0)?.job.deadLetter(draw(texts.slice(2))),
  (_bus, draw, player) => player.pick(player.claims, 0)?.job.ack(draw(bags.slice(2))),
]

function job(draw: Draw): Job {
  return {
    payload: draw(payloads),
    headers: draw(headers),
    dedupKey: draw(ids),
    delayMs: draw([undefined, ...durations]),
    runAt: draw(dates),
    maxAttempts: draw(counts),
    priority: draw(priorities),
  }
}

/** In one of so many, the call is made on a bus that is closed. */
const ON_CLOSED = 4

export async function misuse(player: Player, { bus, call, values }: Extract<Step, { do: 'misuse' }>, n: number): Promise<Seen | undefined> {
  const [last] = values
  const on = last !== undefined && last % ON_CLOSED === 1 && player.closed ? player.closed : await player.bus(bus)
  let drawn = 0
  const draw = <T>(from: readonly unknown[]): T => from[(values[drawn++ % values.length] ?? 0) % from.length] as T
  // A call that throws instead of rejecting would be a difference, too.
  let made: Promise<unknown> | undefined
  try {
    made = CALLS[call % CALLS.length]?.(on, draw, player)
  } catch (error) {
    return `thrown: ${String(error)}`
  }
  if (!made) return 'nothing to misuse'
  player.start(`${n} misuse ${call % CALLS.length}`, made, () => 'fine')
  return undefined
}

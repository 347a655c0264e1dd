/**
 * Every public call, with every argument and every field of one replaced by what it does not expect: it resolves, or rejects with a
 * BusError whose code is documented, and soon; nothing is thrown at the caller, nothing goes unhandled, and the bus stays usable.
 */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type Bus, BusError, PostgresBus, type PostgresTx, Worker } from '../../src/index.ts'
import { MemoryBus } from '../../src/memory/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'

/** A call that takes so long waits for something that never comes. */
const HANGS_MS = 10_000

const schema = freshSchema()
let observer: Session

beforeAll(async () => {
  observer = await session(databaseUrl())
})
afterAll(async () => {
  await observer.query(`drop schema if exists ${schema} cascade`)
  await observer[Symbol.asyncDispose]()
})

function throws(): never {
  throw new TypeError('a trap of the caller')
}
const trapped = (target: object) => new Proxy(target, { get: throws, has: throws, ownKeys: throws, getPrototypeOf: throws })
function revoked(): object {
  const { proxy, revoke } = Proxy.revocable({}, {})
  revoke()
  return proxy
}
function detached(): Uint8Array {
  const bytes = new Uint8Array(8)
  structuredClone(bytes.buffer, { transfer: [bytes.buffer] })
  return bytes
}
const endless = () =>
  Object.assign([1], {
    *[Symbol.iterator]() {
      for (;;) yield { payload: 'p', subject: 's' }
    },
  })

/** Each made anew: a call may keep it, or change it. */
const HOSTILE: Readonly<Record<string, () => unknown>> = {
  undefined: () => undefined,
  null: () => null,
  true: () => true,
  '0': () => 0,
  '-0': () => -0,
  '-1': () => -1,
  '1.5': () => 1.5,
  NaN: () => Number.NaN,
  Infinity: () => Number.POSITIVE_INFINITY,
  '2^31 - 1': () => 2_147_483_647,
  '2^31': () => 2_147_483_648,
  '2^53': () => 2 ** 53,
  bigint: () => 10n,
  symbol: () => Symbol('s'),
  'empty string': () => '',
  'a blank': () => ' ',
  NUL: () => 'a\0b',
  'line breaks': () => 'a\r\nb',
  'a lone surrogate': () => 'a\ud800b',
  'many characters': () => 'x'.repeat(5_000),
  'far too many characters': () => 'x'.repeat(3_000_000),
  quotes: () => `'; drop table klieo.jobs; --"`,
  dots: () => 'a..b',
  wildcards: () => 'a.*.>',
  reserved: () => '$SYS.x',
  __proto__: () => '__proto__',
  'an object': () => ({}),
  'an object without a prototype': () => Object.create(null),
  'an object that is no text': () => ({ toString: throws, valueOf: throws, [Symbol.toPrimitive]: throws, toJSON: throws }),
  'fields that throw': () => Object.defineProperties({}, { query: { get: throws }, payload: { get: throws, enumerable: true } }),
  'a proxy that throws': () => trapped({}),
  'a proxy of an array that throws': () => trapped([]),
  'a proxy of a function that throws': () => trapped(() => {}),
  'a revoked proxy': revoked,
  'an array': () => [],
  'a sparse array': () => new Array(3),
  'an array of null': () => [null],
  'an array that throws': () => Object.defineProperty([1, 2], 1, { get: throws }),
  'an array without an end': endless,
  'a function': () => () => {},
  'a function that throws': () => throws,
  'an asynchronous function that rejects': () => async () => throws(),
  'a class': () => class {},
  'a Map': () => new Map([['a', 'b']]),
  'an invalid date': () => new Date(Number.NaN),
  'a date that throws': () => {
    const value = throws
    return Object.defineProperties(new Date(0), { valueOf: { value }, getTime: { value }, [Symbol.toPrimitive]: { value } })
  },
  'the latest date': () => new Date(8.64e15),
  'the earliest date': () => new Date(-8.64e15),
  'bytes whose memory is gone': detached,
  'bytes that are shared': () => new Uint8Array(new SharedArrayBuffer(4)),
  'numbers of 16 bits': () => new Uint16Array(4),
  'bytes that lie': () => Object.defineProperty(new Uint8Array(4), 'byteLength', { value: -1 }),
  'a Buffer': () => Buffer.from('b'),
  'a promise that rejects': () => {
    const promise = Promise.reject(new Error('of the caller'))
    promise.catch(() => {})
    return promise
  },
  'a thenable that throws': () => ({
    // biome-ignore lint/suspicious/noThenProperty: it is the point
    get then() {
      return throws()
    },
  }),
  'an aborted signal': () => AbortSignal.abort(),
  'something like a signal': () => ({ aborted: false, addEventListener: throws, removeEventListener: throws }),
  'a transaction that rejects': () => ({ query: async () => throws() }),
  'a transaction that throws': () => ({ query: throws }),
  'a transaction that answers nothing': () => ({ query: async () => undefined }),
  'a transaction that answers no rows': () => ({ query: async () => ({ rows: [] }) }),
  'a transaction that answers what is no list': () => ({ query: async () => ({ rows: 5 }) }),
  'a transaction that answers empty rows': () => ({ query: async () => ({ rows: [{}] }) }),
  'a transaction that answers null': () => ({ query: async () => ({ rows: [null] }) }),
}

/** A hostile value in a place that may be nested: `[1, 'headers', 'a']` is the field a of the field headers of the second argument. */
type Place = readonly (string | number)[]

interface Call {
  /** Arguments that are right: each place in them is attacked. */
  readonly args: () => unknown[]
  readonly make: (bus: Bus<PostgresTx>, args: unknown[]) => unknown
  /** Waits where the bus may: a hostile value that is a long wait is right. */
  readonly mayWait?: boolean
}

// biome-ignore lint/suspicious/noExplicitAny: what the compiler would refuse is what is tried
type Any = any

const tx = () => ({ query: async () => ({ rows: [] }) })
const signal = () => new AbortController().signal
const CALLS: Readonly<Record<string, Call>> = {
  publish: {
    args: () => ['fuzz.s', 'p', { headers: { a: 'b' }, msgId: 'id', tx: undefined }],
    make: ({ pubsub }, args) => pubsub.publish(...(args as [Any, Any])),
  },
  publishMany: {
    args: () => [[{ subject: 'fuzz.s', payload: 'p', headers: { a: 'b' }, msgId: 'id2' }], { tx: undefined }],
    make: ({ pubsub }, args) => pubsub.publishMany(...(args as [Any])),
  },
  subscribe: {
    args: () => [
      'fuzz.s',
      'fuzz',
      { ackWaitMs: 30_000, maxDeliver: 3, maxAckPending: 10, maxInFlight: 10, start: { seq: 1 }, signal: signal() },
    ],
    make: ({ pubsub }, args) => pubsub.subscribe(...(args as [Any, Any])),
  },
  deleteDurable: { args: () => ['nobodys'], make: ({ pubsub }, args) => pubsub.deleteDurable(...(args as [Any])) },
  request: {
    args: () => ['fuzz.nobody', 'p', { timeoutMs: 50, headers: { a: 'b' }, signal: signal() }],
    make: ({ requestReply }, args) => requestReply.request(...(args as [Any, Any, Any])),
  },
  respond: {
    args: () => ['fuzz.answer', () => 'a', { concurrency: 2 }],
    make: ({ requestReply }, args) => requestReply.respond(...(args as [Any, Any])),
  },
  get: { args: () => ['fuzz', 'k'], make: ({ kv }, args) => kv.get(...(args as [Any, Any])) },
  put: { args: () => ['fuzz', 'k', 'v', { ttlMs: 1_000, tx: undefined }], make: ({ kv }, args) => kv.put(...(args as [Any, Any, Any])) },
  cas: {
    args: () => ['fuzz', 'c', 'v', null, { ttlMs: 1_000, tx: undefined }],
    make: ({ kv }, args) => kv.cas(...(args as [Any, Any, Any, Any])),
  },
  delete: { args: () => ['fuzz', 'd', { expected: 1, tx: undefined }], make: ({ kv }, args) => kv.delete(...(args as [Any, Any])) },
  keys: {
    args: () => ['fuzz', '>'],
    make: async ({ kv }, args) => {
      for await (const key of kv.keys(...(args as [Any]))) expect(typeof key).toBe('string')
    },
  },
  watch: {
    args: () => ['fuzz', '>', { signal: signal(), updatesOnly: true }],
    make: ({ kv }, args) => kv.watch(...(args as [Any])),
  },
  lease: {
    args: () => ['fuzz', 'l', 1_000, { waitMs: 10, signal: signal() }],
    make: ({ kv }, args) => kv.lease(...(args as [Any, Any, Any])),
  },
  enqueue: {
    args: () => [
      'fuzz',
      { payload: 'p', headers: { a: 'b' }, dedupKey: 'key', maxAttempts: 3, delayMs: undefined, runAt: new Date(), priority: 1 },
      { tx: undefined },
    ],
    make: ({ jobs }, args) => jobs.enqueue(...(args as [Any, Any])),
  },
  enqueueMany: {
    args: () => [
      'fuzz',
      [{ payload: 'p', headers: { a: 'b' }, dedupKey: 'key2', maxAttempts: 3, delayMs: 5, runAt: undefined, priority: 1 }],
      { tx: undefined },
    ],
    make: ({ jobs }, args) => jobs.enqueueMany(...(args as [Any, Any])),
  },
  claim: {
    args: () => ['fuzz-empty', 'w', 1_000, { waitMs: 1, signal: signal() }],
    make: ({ jobs }, args) => jobs.claim(...(args as [Any, Any, Any])),
  },
  claimMany: {
    args: () => ['fuzz-empty', 'w', 1_000, { limit: 5, waitMs: 1, signal: signal() }],
    make: ({ jobs }, args) => jobs.claimMany(...(args as [Any, Any, Any, Any])),
  },
  'ack of a message': { args: () => [{ tx: tx() }], make: settleMessage('ack') },
  'nak of a message': { args: () => [5], make: settleMessage('nak') },
  'term of a message': { args: () => ['reason'], make: settleMessage('term') },
  'ack of a job': { args: () => [{ tx: tx() }], make: settleJob('ack') },
  'nak of a job': { args: () => [5], make: settleJob('nak') },
  'deadLetter of a job': { args: () => ['reason'], make: settleJob('deadLetter') },
  Worker: {
    args: () => ['fuzz-empty', async () => {}, { concurrency: 1, leaseTtlMs: 1_000, workerId: 'w', onError: () => {} }],
    make: async ({ jobs }, args) => {
      const worker = new Worker(jobs, ...(args as [Any, Any]))
      await worker.stop()
    },
  },
  'stop of a Worker': {
    args: () => [{ graceMs: 1 }],
    make: async ({ jobs }, args) => {
      const worker = new Worker(jobs, 'fuzz-empty', async () => {})
      const stop = () => {
        try {
          return worker.stop(...(args as [Any]))
        } catch (error) {
          throw new Error('stop threw', { cause: error })
        }
      }
      try {
        await stop()
      } finally {
        await worker.stop()
      }
    },
  },
}

let settled = 0

function settleMessage(how: 'ack' | 'nak' | 'term') {
  return async ({ pubsub }: Bus<PostgresTx>, args: unknown[]) => {
    const subject = `fuzz.settle.s${++settled}`
    const stream = await pubsub.subscribe(subject, `settle-${settled}`)
    try {
      await pubsub.publish(subject, 'p')
      for await (const message of stream) return await (message[how] as Any)(...args)
    } finally {
      await stream.close()
    }
  }
}

function settleJob(how: 'ack' | 'nak' | 'deadLetter') {
  return async ({ jobs }: Bus<PostgresTx>, args: unknown[]) => {
    const queue = `fuzz-settle-${++settled}`
    await jobs.enqueue(queue, { payload: 'p' })
    const job = await jobs.claim(queue, 'w', 30_000)
    return (job![how] as Any)(...args)
  }
}

/** Down to the fields of the arguments' fields. */
function placesOf(args: readonly unknown[]): Place[] {
  const places: Place[] = []
  const visit = (value: unknown, place: Place) => {
    if (place.length > 0) places.push(place)
    const isPlain =
      Array.isArray(value) || (value !== null && typeof value === 'object' && Object.getPrototypeOf(value) === Object.prototype)
    if (!isPlain || place.length > 3 || 'query' in (value as object)) return
    for (const [key, field] of Object.entries(value as object)) visit(field, [...place, key])
  }
  visit(args, [])
  return places
}

function replaced(args: unknown[], place: Place, value: unknown): unknown[] {
  const parent = place.slice(0, -1).reduce<Any>((inner, key) => inner[key], args)
  parent[place.at(-1)!] = value
  return args
}

const CODES = new Set([
  'not_found',
  'conflict',
  'cas_conflict',
  'lease_held',
  'lease_lost',
  'already_settled',
  'timeout',
  'invalid_argument',
  'payload_too_large',
  'unsupported',
])

async function trial(bus: Bus<PostgresTx>, call: Call, args: unknown[]): Promise<string | undefined> {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<'late'>((resolve) => {
    timer = setTimeout(resolve, HANGS_MS, 'late')
  })
  let answer: unknown
  try {
    answer = call.make(bus, args)
  } catch (error) {
    return `threw ${error} at the caller`
  }
  try {
    const result = await Promise.race([answer as Promise<unknown>, late])
    if (result === 'late') return 'was not answered'
    const open = result as { close?: () => Promise<void>; release?: () => Promise<void> } | null | undefined
    await (open?.release ?? open?.close)?.call(open)
    return undefined
  } catch (error) {
    if (!(error instanceof BusError)) return `rejected with ${error}`
    // What a transaction of the caller's throws, and is no error of a server, is the cause of an internal one.
    const isCallers = error.code === 'internal' && String(error.cause).includes('a trap of the caller')
    return CODES.has(error.code) || isCallers ? undefined : `rejected with ${error.code}: ${error.message}`
  } finally {
    clearTimeout(timer)
  }
}

const BACKENDS: Readonly<Record<string, () => Promise<Bus<PostgresTx>>>> = {
  PostgresBus: () => PostgresBus.connect({ connectionString: databaseUrl(), schema, maintenance: false }),
  MemoryBus: async () => MemoryBus.create() as unknown as Bus<PostgresTx>,
}

for (const [backend, open] of Object.entries(BACKENDS)) {
  describe(backend, () => {
    let bus: Bus<PostgresTx>
    beforeAll(async () => {
      bus = await open()
    })
    afterAll(() => bus.close())

    for (const [name, call] of Object.entries(CALLS)) {
      test(`section 7: ${name} with whatever it does not expect`, { timeout: 120_000 }, async () => {
        const wrong: string[] = []
        for (const place of placesOf(call.args())) {
          for (const [what, value] of Object.entries(HOSTILE)) {
            const outcome = await trial(bus, call, replaced(call.args(), place, value()))
            if (outcome !== undefined) wrong.push(`${name}(${place.join('.')}: ${what}) ${outcome.slice(0, 200)}`)
          }
        }
        expect(wrong).toEqual([])
        // What is right works as before.
        expect(await bus.kv.put('fuzz-after', 'k', 'v')).toBeGreaterThan(0)
      })
    }
  })
}

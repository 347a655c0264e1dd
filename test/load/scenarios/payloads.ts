/**
 * Payloads of 1 MiB, the most that a bus takes by default, by the hundred. Each kind of use is a process of its own, so that the
 * most memory that it ever took is known. Beside them somebody publishes small messages and must not notice.
 */

import { BusError, PostgresBus, Worker } from '../../../src/index.ts'
import { type Acted, type Actor, beside, type Load, quantile, range, type Scenario, timed } from '../scenario.ts'
import { peakPrivateMemory } from '../server.ts'

const MIB = 2 ** 20
/** What a container with a gigabyte has to spare beside the app. */
const MEMORY = { atMost: 512, why: 'a process with half a gigabyte survives it' }

/** The caller's own 100 MiB, one copy that is packed and two of the driver's, which grows the first of them by halves. */
const BATCH_MEMORY = { atMost: 768, why: 'six times what the call carries, and the process itself' }

interface Given {
  readonly url: string
  readonly count: number
}

/** No two alike, so that nothing compresses one into another. */
function payload(n: number): Uint8Array {
  const bytes = new Uint8Array(MIB)
  for (let at = 0; at < bytes.length; at += 65_536) crypto.getRandomValues(bytes.subarray(at, at + 65_536))
  bytes[0] = n & 255
  return bytes
}

async function codeOf(call: Promise<unknown>): Promise<string> {
  return call.then(
    () => 'none',
    (error: unknown) => (error instanceof BusError ? error.code : String(error)),
  )
}

/** An actor that has a bus and answers how long its work took, in ms, and how much it did. */
function withBus(work: (bus: PostgresBus, given: Given) => Promise<number>): Actor {
  return async (given: Given) => {
    await using bus = await PostgresBus.connect({ connectionString: given.url })
    const began = performance.now()
    const done = await work(bus, given)
    return { done, ms: performance.now() - began }
  }
}

const actors = {
  publishMany: withBus(async ({ pubsub }, { count }) => {
    const acks = await pubsub.publishMany(range(count).map((n) => ({ subject: 'large.many', payload: payload(n) })))
    return acks.length
  }),
  publish: withBus(async ({ pubsub }, { count }) => {
    const acks = await Promise.all(range(count).map((n) => pubsub.publish('large.one', payload(n))))
    return acks.length
  }),
  refusals: async ({ url }: Given) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    const one = payload(0)
    const tooLong = new Uint8Array(MIB + 1)
    const most = range(257)
    return {
      publish: await codeOf(bus.pubsub.publish('large.refused', tooLong)),
      put: await codeOf(bus.kv.put('large', 'refused', tooLong)),
      enqueue: await codeOf(bus.jobs.enqueue('large', { payload: tooLong })),
      request: await codeOf(bus.requestReply.request('large.refused', tooLong, { timeoutMs: 1_000 })),
      publishMany: await codeOf(bus.pubsub.publishMany(most.map(() => ({ subject: 'large.refused', payload: one })))),
      enqueueMany: await codeOf(
        bus.jobs.enqueueMany(
          'large',
          most.map(() => ({ payload: one })),
        ),
      ),
      afterwards: await codeOf(bus.pubsub.publish('large.afterwards', 'small')),
    }
  },
  enqueueMany: withBus(async ({ jobs }, { count }) => {
    const ids = await jobs.enqueueMany(
      'large',
      range(count).map((n) => ({ payload: payload(n) })),
    )
    return ids.length
  }),
  claimMany: withBus(async ({ jobs }) => {
    let bytes = 0
    for (;;) {
      const claimed = await jobs.claimMany('large', 'load', 60_000, { limit: 100 })
      if (claimed.length === 0) return bytes / MIB
      for (const { payload: each } of claimed) bytes += each.byteLength
      await Promise.all(claimed.map((job) => job.ack()))
    }
  }),
  worker: withBus(async (bus, { count }) => {
    let handled = 0
    const all = Promise.withResolvers<void>()
    const handle = async () => {
      if (++handled === count) all.resolve()
    }
    await using _worker = new Worker(bus.jobs, 'large', handle, { concurrency: 32 })
    await all.promise
    return handled
  }),
  consume: withBus(async ({ pubsub }, { count }) => {
    await using stream = await pubsub.subscribe('large.>', 'consume', { maxInFlight: 256 })
    let seen = 0
    for await (const message of stream) {
      if (message.payload.byteLength !== MIB) continue
      void message.ack()
      if (++seen === count) return seen
    }
    return seen
  }),
  get: withBus(async ({ kv }, { count }) => {
    const entries = await Promise.all(range(count).map((n) => kv.get('large', `key-${n}`)))
    return entries.filter((entry) => entry?.value.byteLength === MIB).length
  }),
  put: withBus(async ({ kv }, { count }) => {
    await Promise.all(range(count).map((n) => kv.put('large', `key-${n}`, payload(n))))
    return count
  }),
  /** Reads what is there, and then as many changes. */
  watch: async ({ url, count }: Given, { say }) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    const began = performance.now()
    await using watch = await bus.kv.watch('large')
    let seen = 0
    for await (const change of watch) {
      if (change.operation !== 'put') continue
      if (++seen === count) say({ watching: performance.now() - began })
      if (seen === 2 * count) break
    }
    return { done: seen, ms: performance.now() - began }
  },
  respond: async ({ url }: Given, { say, cue }) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    let handled = 0
    await bus.requestReply.respond('large.ask', (request) => {
      handled++
      return request.payload
    })
    say({ responding: true })
    await cue()
    return { done: handled, ms: 0 }
  },
  request: withBus(async ({ requestReply }, { count }) => {
    const replies = await Promise.all(range(count).map((n) => requestReply.request('large.ask', payload(n), { timeoutMs: 60_000 })))
    return replies.filter((reply) => reply.byteLength === MIB).length
  }),
} satisfies Record<string, Actor>

type Timed = { readonly done: number; readonly ms: number }

async function run({ server, ledger, size, start }: Load): Promise<void> {
  const count = size(100, 20)
  const { url } = server
  await using bus = await PostgresBus.connect({ connectionString: url })
  const within = (ms: number, n: number) =>
    ledger.measure('… time for it', ms / 1_000, 's', { atMost: 5 + n / 4, why: 'at least 4 MiB a second' })

  const act = async (what: string, actor: keyof typeof actors, wanted: number, given: object = {}): Promise<Acted<Timed>> => {
    const acted = await start(actor, { count: wanted, ...given }).ended<Timed>()
    ledger.exactly(`${what}: MiB`, acted.answer.done, wanted, 'all of them, whole')
    within(acted.answer.ms, wanted)
    ledger.measure('… memory of the process', acted.peakMiB, 'MiB', actor.endsWith('Many') && actor !== 'claimMany' ? BATCH_MEMORY : MEMORY)
    return acted
  }

  const all = async () => {
    const refused = (await start('refusals', {}).ended<Record<string, string>>()).answer
    const wanted = Object.entries(refused).filter(([call, code]) => code === (call === 'afterwards' ? 'none' : 'payload_too_large'))
    ledger.exactly('too large: calls refused with payload_too_large, and a publish after them', wanted.length, 7, JSON.stringify(refused))

    await act('publishMany in one call', 'publishMany', count)
    await act('publish, all at once', 'publish', count)
    await act('a stream with maxInFlight 256', 'consume', 2 * count)
    await act('enqueueMany in one call', 'enqueueMany', count)
    await act('claimMany with limit 100', 'claimMany', count)
    await start('enqueueMany', { count }).ended()
    await start('enqueueMany', { count }).ended()
    await act('a worker with 32 places', 'worker', 2 * count)
    await act('put, all at once', 'put', count)
    await act('get, all at once', 'get', count)

    const watching = start('watch', { count })
    const ms = await watching.told<number>('watching')
    await act('put again, with a watch', 'put', count)
    const watched = await watching.ended<Timed>()
    ledger.exactly('watch, what is there and then the changes: MiB', watched.answer.done, 2 * count, 'every change')
    within(ms, count)
    ledger.measure('… memory of the process', watched.peakMiB, 'MiB', MEMORY)

    const responding = start('respond', {})
    await responding.told('responding')
    await act('request, all at once', 'request', count)
    responding.cue()
    const responded = await responding.ended<Timed>()
    ledger.exactly('… handled by the responder', responded.answer.done, count, 'each once')
    ledger.measure('… memory of its process', responded.peakMiB, 'MiB', MEMORY)
  }

  const { result, peakMiB } = await peakPrivateMemory(server.pid, () =>
    beside(all(), 20, () => bus.pubsub.publish('small', 'x'.repeat(100))),
  )
  ledger.measure('a small publish beside all of it, p50', quantile(result.latencies, 0.5), 'ms', { atMost: 50, why: 'nobody notices' })
  ledger.measure('a small publish beside all of it, p99', quantile(result.latencies, 0.99), 'ms', {
    atMost: 1_000,
    why: 'it waits for the disk behind megabytes, and no longer than a person would',
  })
  ledger.measure('memory of the server beside shared_buffers', peakMiB, 'MiB', {
    atMost: 1_024,
    why: 'the largest statement holds 100 MiB',
  })
  const settled = await timed(() => bus.pubsub.publish('small', 'x'))
  ledger.measure('a publish afterwards', settled, 'ms', { atMost: 250, why: 'it is over' })
}

export const payloads: Scenario = {
  name: 'payloads',
  title: '1 MiB by the hundred',
  actors,
  run,
}

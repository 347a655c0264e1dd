/** Sizes, numbers and options: what is refused before anything is sent, and what is just allowed (section 7). */

import assert from 'node:assert/strict'
import type { Headers, Job, Payload } from '../../core/types.ts'
import { Reader, rejects, type Suite, sameBytes, sameHeaders, text, timed, unique, within } from './kit.ts'
import { drain, refuses, unharmed } from './refusals.ts'

const LONG_TTL_MS = 60_000
const MAX_DURATION_MS = 2_147_483_647
const MIB = 1_048_576

const NO_DURATIONS: unknown[] = [-1, 0.5, Number.NaN, Number.POSITIVE_INFINITY, MAX_DURATION_MS + 1, '1', null, {}, 10n, new Date()]

const NO_PAYLOADS: unknown[] = [
  undefined,
  null,
  5,
  {},
  [],
  [1, 2],
  true,
  new ArrayBuffer(2),
  new Uint16Array(1),
  new DataView(new ArrayBuffer(1)),
  { length: 1, 0: 1 },
  10n,
]
const NO_HEADERS: unknown[] = [
  null,
  'x',
  5,
  ['a'],
  new Map([['a', 'b']]),
  { '': 'x' },
  { 'a b': 'x' },
  { 'a:b': 'x' },
  { 'a\n': 'x' },
  { ä: 'x' },
  { 'a\x7f': 'x' },
  { a: 'x\r' },
  { a: '\nx' },
  { a: 'x\r\ny: z' },
  { a: '\0' },
  { a: 5 },
  { a: undefined },
  { a: null },
  { a: ['x'] },
]

const as = <T>(value: unknown) => value as T

export function argumentTests<Tx>(suite: Suite<Tx>): void {
  suite.group('sizes', () => {
    suite.test('section 7: what is no payload is refused', async (stage) => {
      const bus = await stage.open()
      const [queue, bucket, subject] = [unique('q'), unique('b'), unique('p')]
      await refuses('payload', NO_PAYLOADS, (payload) => bus.pubsub.publish(subject, payload))
      await refuses('payload', NO_PAYLOADS, (payload) => bus.pubsub.publishMany([{ subject, payload }]))
      await refuses('payload', NO_PAYLOADS, (payload) => bus.jobs.enqueue(queue, { payload }))
      await refuses('payload', NO_PAYLOADS, (payload) => bus.jobs.enqueueMany(queue, [{ payload: 'x' }, { payload }]))
      await refuses('payload', NO_PAYLOADS, (payload) => bus.requestReply.request(subject, payload, { timeoutMs: 1_000 }))
      await refuses(/value|payload/, NO_PAYLOADS, (value) => bus.kv.put(bucket, 'k', value))
      await refuses(/value|payload/, NO_PAYLOADS, (value) => bus.kv.cas(bucket, 'k', value, null))
      await unharmed(bus, queue)
    })

    suite.test('section 7: payloads of 1 MiB pass, one byte more is payload_too_large', async (stage) => {
      const bus = await stage.open()
      const [queue, bucket, subject] = [unique('q'), unique('b'), unique('p')]
      const largest = new Uint8Array(MIB).fill(7)
      const { next, nothing } = await stage.subscribe(bus, subject, unique('d'))
      await bus.requestReply.respond(subject, ({ payload }) => `${payload.length}`)
      const writes: Record<string, (payload: Payload) => Promise<unknown>> = {
        publish: (payload) => bus.pubsub.publish(subject, payload),
        publishMany: (payload) =>
          bus.pubsub.publishMany([
            { subject, payload: 'small' },
            { subject, payload },
          ]),
        enqueue: (payload) => bus.jobs.enqueue(queue, { payload }),
        enqueueMany: (payload) => bus.jobs.enqueueMany(queue, [{ payload }]),
        put: (payload) => bus.kv.put(bucket, 'k', payload),
        cas: (payload) => bus.kv.cas(bucket, 'cas', payload, null),
        request: (payload) => bus.requestReply.request(subject, payload, { timeoutMs: 8_000 }),
      }
      for (const write of Object.values(writes)) {
        await rejects(write(new Uint8Array(MIB + 1)), 'payload_too_large')
        await rejects(write('x'.repeat(MIB + 1)), 'payload_too_large')
        await rejects(write('ä'.repeat(MIB / 2 + 1)), 'payload_too_large')
      }
      await nothing(100)
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS), null)
      for (const [name, write] of Object.entries(writes)) await within(write(largest), 8_000, name)
      for (const size of [MIB, 5, MIB]) assert.equal((await next()).payload.length, size)
      const jobs = await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 5 })
      assert.deepEqual(
        jobs.map(({ payload }) => payload.length),
        [MIB, MIB],
      )
      sameBytes((await bus.kv.get(bucket, 'k'))!.value, largest)
      sameBytes((await bus.kv.get(bucket, 'cas'))!.value, largest)
    })

    suite.test('section 7: a far too large payload is refused fast', async (stage) => {
      const bus = await stage.open()
      const huge = new Uint8Array(100 * MIB)
      const ms = await timed(() => rejects(bus.pubsub.publish(unique('p'), huge), 'payload_too_large'))
      assert.ok(ms < 1_000, `took ${ms} ms`)
    })

    suite.test('section 7: maxPayloadBytes is the limit of its own handle', async (stage) => {
      const [small, large, other] = [
        await stage.open({ maxPayloadBytes: 10 }),
        await stage.open({ maxPayloadBytes: 8 * MIB }),
        await stage.open(),
      ]
      const subject = unique('p')
      await small.pubsub.publish(subject, '0123456789')
      await rejects(small.pubsub.publish(subject, '0123456789a'), 'payload_too_large')
      await rejects(small.pubsub.publish(subject, 'äöüäöü'), 'payload_too_large')
      await large.pubsub.publish(subject, new Uint8Array(8 * MIB))
      await rejects(large.pubsub.publish(subject, new Uint8Array(8 * MIB + 1)), 'payload_too_large')
      for (const handle of [small, other]) {
        const { reader } = await stage.subscribe(handle, subject, unique('d'))
        assert.deepEqual(
          (await reader.take(2)).map(({ payload }) => payload.length),
          [10, 8 * MIB],
        )
      }
    })

    suite.test('section 7: maxPayloadBytes is at most 8 MiB', async (stage) => {
      await refuses('maxPayloadBytes', [8 * MIB + 1, -1, 0.5, Number.NaN, '1', null], (maxPayloadBytes) => stage.open({ maxPayloadBytes }))
    })

    suite.test('section 7: what are no headers is refused', async (stage) => {
      const bus = await stage.open()
      const [queue, subject] = [unique('q'), unique('p')]
      await refuses('headers', NO_HEADERS, (headers) => bus.pubsub.publish(subject, 'x', { headers }))
      await refuses('headers', NO_HEADERS, (headers) => bus.pubsub.publishMany([{ subject, payload: 'x', headers }]))
      await refuses('headers', NO_HEADERS, (headers) => bus.jobs.enqueue(queue, { payload: 'x', headers }))
      await refuses('headers', NO_HEADERS, (headers) => bus.requestReply.request(subject, 'x', { timeoutMs: 1_000, headers }))
      await unharmed(bus, queue)
    })

    suite.test('section 7: headers of 64 KiB together pass, one byte more does not', async (stage) => {
      const bus = await stage.open()
      const [queue, subject] = [unique('q'), unique('p')]
      const largest: Headers = { a: 'ä'.repeat(16_384 / 2), b: 'x'.repeat(65_536 - 16_384 - 2) }
      const beyond: Headers = { ...largest, b: `${largest.b}x` }
      await bus.jobs.enqueue(queue, { payload: 'x', headers: largest })
      sameHeaders((await bus.jobs.claim(queue, 'w', LONG_TTL_MS))!.headers, largest)
      await bus.pubsub.publish(subject, 'x', { headers: largest })
      const { next } = await stage.subscribe(bus, subject, unique('d'))
      sameHeaders((await next()).headers, largest)
      await refuses('headers', [beyond], (headers) => bus.jobs.enqueue(queue, { payload: 'x', headers }))
      await refuses('headers', [beyond], (headers) => bus.pubsub.publish(subject, 'x', { headers }))
      await refuses('headers', [beyond], (headers) => bus.requestReply.request(subject, 'x', { timeoutMs: 1_000, headers }))
    })
  })

  suite.group('numbers and options', () => {
    suite.test('section 7: durations are integers from 0 to 2,147,483,647', async (stage) => {
      const bus = await stage.open()
      const [queue, bucket, subject] = [unique('q'), unique('b'), unique('p')]
      await refuses('ackWaitMs', NO_DURATIONS, (ackWaitMs) => bus.pubsub.subscribe(subject, unique('d'), { ackWaitMs }))
      await refuses('timeoutMs', [undefined, ...NO_DURATIONS], (timeoutMs) => bus.requestReply.request(subject, 'x', { timeoutMs }))
      await refuses('ttlMs', NO_DURATIONS, (ttlMs) => bus.kv.put(bucket, 'k', 'x', { ttlMs }))
      await refuses('ttlMs', NO_DURATIONS, (ttlMs) => bus.kv.cas(bucket, 'k', 'x', null, { ttlMs }))
      await refuses('ttlMs', [undefined, ...NO_DURATIONS], (ttlMs) => bus.kv.lease(bucket, 'k', ttlMs))
      await refuses('waitMs', NO_DURATIONS, (waitMs) => bus.kv.lease(bucket, 'k', 1_000, { waitMs }))
      await refuses('delayMs', NO_DURATIONS, (delayMs) => bus.jobs.enqueue(queue, { payload: 'x', delayMs }))
      await refuses('leaseTtlMs', [undefined, ...NO_DURATIONS], (ttl) => bus.jobs.claim(queue, 'w', ttl))
      await refuses('leaseTtlMs', [undefined, ...NO_DURATIONS], (ttl) => bus.jobs.claimMany(queue, 'w', ttl, { limit: 1 }))
      await refuses('waitMs', NO_DURATIONS, (waitMs) => bus.jobs.claim(queue, 'w', 1_000, { waitMs }))
      await refuses('waitMs', NO_DURATIONS, (waitMs) => bus.jobs.claimMany(queue, 'w', 1_000, { limit: 1, waitMs }))
      assert.equal(await bus.kv.get(bucket, 'k'), null)
      await unharmed(bus, queue)
      await bus.kv.lease(bucket, 'k', 1_000)
    })

    suite.test('section 7: the longest durations mean what they say', async (stage) => {
      const bus = await stage.open()
      const [queue, bucket, subject] = [unique('q'), unique('b'), unique('p')]
      await bus.jobs.enqueueMany(queue, [
        { payload: 'later', delayMs: MAX_DURATION_MS },
        { payload: 'now', delayMs: 0 },
      ])
      const job = await bus.jobs.claim(queue, 'w', MAX_DURATION_MS)
      assert.equal(text(job!.payload), 'now')
      const lease = await bus.kv.lease(bucket, 'k', MAX_DURATION_MS)
      await bus.kv.put(bucket, 'k', 'x', { ttlMs: MAX_DURATION_MS })
      await bus.requestReply.respond(subject, () => 'reply')
      sameBytes(await bus.requestReply.request(subject, 'x', { timeoutMs: MAX_DURATION_MS }), 'reply')
      const { next, nothing } = await stage.subscribe(bus, subject, unique('d'), { ackWaitMs: MAX_DURATION_MS })
      await bus.pubsub.publishMany([
        { subject, payload: '1' },
        { subject, payload: '2' },
      ])
      await (await next()).nak(MAX_DURATION_MS)
      const held = await next()
      await nothing()
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 100 }), null)
      assert.deepEqual([job!.lease.signal.aborted, lease.signal.aborted], [false, false])
      await held.extend()
      await held.ack()
      await job!.heartbeat()
      await job!.nak(MAX_DURATION_MS)
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS), null)
      await lease.heartbeat()
      assert.ok(await bus.kv.get(bucket, 'k'))
    })

    suite.test('section 7: what is no job is refused', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const cases: Record<string, unknown[]> = {
        maxAttempts: [0, -1, 1.5, Number.NaN, '3', null, Number.POSITIVE_INFINITY],
        priority: [-101, 101, 0.5, Number.NaN, '1', null],
        runAt: [new Date(Number.NaN), '2030-01-01', 0, null, {}],
      }
      for (const [argument, values] of Object.entries(cases)) {
        await refuses(argument, values, (value) => bus.jobs.enqueue(queue, { payload: 'x', [argument]: value }))
        await refuses(argument, values, (value) => bus.jobs.enqueueMany(queue, [{ payload: 'x' }, { payload: 'x', [argument]: value }]))
      }
      await refuses(/job|payload/, [undefined, null, 'x', 1, {}], (job) => bus.jobs.enqueue(queue, job))
      await refuses(/jobs?|payload/, [undefined, null, 'x', {}, [null], [{}]], (jobs) => bus.jobs.enqueueMany(queue, jobs))
      await refuses('options', [undefined, null, 5], (options) => bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, options))
      await refuses('limit', [undefined, 0, -1, 1.5, Number.NaN, '1'], (limit) => bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit }))
      await unharmed(bus, queue)
    })

    suite.test('section 7: the ends of the ranges of a job are within them', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const extremes: Job[] = [
        { payload: '', maxAttempts: 1 },
        { payload: '', runAt: new Date(8.64e15) },
      ]
      if (bus.supports.priorities) extremes.push({ payload: '', priority: -100 }, { payload: '', priority: 100 })
      const ids = await bus.jobs.enqueueMany(queue, extremes)
      const jobs = await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 10 })
      assert.equal(jobs.length, ids.length - 1)
      assert.ok(jobs.every(({ id }) => id !== ids[1]))
    })

    suite.test('section 7: what are no options of a subscription is refused, and makes no durable', async (stage) => {
      const bus = await stage.open()
      const durable = unique('d')
      const counts = [0, -1, 1.5, Number.NaN, '1', null]
      for (const argument of ['maxDeliver', 'maxAckPending', 'maxInFlight']) {
        await refuses(argument, counts, (value) => bus.pubsub.subscribe('a', durable, { [argument]: value }))
      }
      await refuses(
        'start',
        [
          'old',
          {},
          null,
          5,
          { seq: -1 },
          { seq: 1.5 },
          { seq: '1' },
          { time: 'x' },
          { time: new Date(Number.NaN) },
          { seq: 1, time: new Date() },
        ],
        (start) => bus.pubsub.subscribe('a', durable, { start }),
      )
      await refuses('signal', [{}, 'x', null], (signal) => bus.pubsub.subscribe('a', durable, { signal }))
      await rejects(bus.pubsub.deleteDurable(durable), 'not_found')
    })

    suite.test('section 7: what is no revision is refused', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const revision = await bus.kv.put(bucket, 'k', 'x')
      const bad = [0, -1, 1.5, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 53, '1', {}]
      await refuses('expected', [undefined, ...bad], (expected) => bus.kv.cas(bucket, 'k', 'y', expected))
      await refuses('expected', bad, (expected) => bus.kv.delete(bucket, 'k', { expected }))
      assert.equal((await bus.kv.get(bucket, 'k'))?.revision, revision)
    })

    suite.test('section 7: what is no handler, no signal and no batch is refused', async (stage) => {
      const bus = await stage.open()
      const [queue, bucket, subject] = [unique('q'), unique('b'), unique('r')]
      await refuses('handler', [undefined, null, 'x', {}], (handler) => bus.requestReply.respond(subject, handler))
      await refuses('concurrency', [0, -1, 1.5, Number.NaN, '1'], (concurrency) =>
        bus.requestReply.respond(subject, () => '', { concurrency }),
      )
      await rejects(bus.requestReply.request(subject, 'x', { timeoutMs: 1_000 }), 'not_found')
      await refuses('messages', [undefined, null, 'x', {}], (messages) => bus.pubsub.publishMany(messages))
      const noSignals = [{}, 'x', null]
      await refuses('signal', noSignals, (signal) => bus.jobs.claim(queue, 'w', LONG_TTL_MS, { signal }))
      await refuses('signal', noSignals, (signal) => bus.kv.lease(bucket, 'k', LONG_TTL_MS, { signal }))
      await refuses('signal', noSignals, (signal) => bus.requestReply.request(subject, 'x', { timeoutMs: 1_000, signal }))
      if (bus.supports.watch) await refuses('signal', noSignals, (signal) => bus.kv.watch(bucket, '>', { signal }))
      await bus.kv.lease(bucket, 'k', 1_000)
    })

    suite.test('section 7: unknown queues, durables and buckets are empty, not errors', async (stage) => {
      const bus = await stage.open()
      assert.equal(await bus.jobs.claim(unique('q'), 'w', LONG_TTL_MS), null)
      assert.equal(await bus.kv.get(unique('b'), 'k'), null)
      await bus.kv.delete(unique('b'), 'k')
      await drain(bus.kv.keys(unique('b')))
      await new Reader(await bus.pubsub.subscribe(unique('p'), unique('d'))).nothing(100)
    })

    suite.test('section 7: retryable says whether the same call may succeed later and is safe to repeat', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
      const errors = [
        await rejects(bus.kv.lease(bucket, 'k', LONG_TTL_MS), 'lease_held'),
        await rejects(bus.kv.cas(bucket, 'k', 'x', 1), 'cas_conflict'),
        await rejects(bus.kv.get(bucket, ''), 'invalid_argument'),
        await rejects(bus.kv.put(bucket, 'k', new Uint8Array(MIB + 1)), 'payload_too_large'),
      ]
      assert.deepEqual(
        errors.map(({ retryable }) => retryable),
        [true, false, false, false],
      )
    })

    suite.test('section 7: a bus says what it supports', async (stage) => {
      const bus = await stage.open()
      assert.deepEqual(bus.supports, stage.supports)
    })

    suite.test('section 7: errors name the argument and not its value, which may be secret', async (stage) => {
      const bus = await stage.open()
      const secret = 'a secret, and no name'
      for (const call of [
        () => bus.kv.get('b', secret),
        () => bus.jobs.enqueue(secret, { payload: 'x' }),
        () => bus.pubsub.publish(secret, 'x'),
        () => bus.pubsub.publish('a', 'x', { headers: { a: `${secret}\n` } }),
        () => bus.pubsub.publish('a', as<string>({ secret })),
      ]) {
        const error = await rejects(call(), 'invalid_argument')
        assert.ok(!error.message.includes('secret'), error.message)
      }
    })
  })
}

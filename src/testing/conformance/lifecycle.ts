/** What `close()` leaves behind: section 7. */

import assert from 'node:assert/strict'
import { BusError, isBusError } from '../../core/errors.ts'
import type { Bus, KvChange } from '../../core/types.ts'
import { eventually, PATIENCE_MS, pause, Reader, rejects, type Suite, sameBytes, text, unique, within, withinASecond } from './kit.ts'
import { drain } from './refusals.ts'

const LONG_TTL_MS = 60_000
const CLOSE_ROUNDS = 8

/** Every call of the interfaces, with arguments that would do. */
function calls<Tx>(bus: Bus<Tx>): Record<string, () => Promise<unknown>> {
  const name = unique('closed')
  return {
    publish: () => bus.pubsub.publish(name, 'x'),
    publishMany: () => bus.pubsub.publishMany([{ subject: name, payload: 'x' }]),
    'publishMany of none': () => bus.pubsub.publishMany([]),
    subscribe: () => bus.pubsub.subscribe(name, name),
    deleteDurable: () => bus.pubsub.deleteDurable(name),
    request: () => bus.requestReply.request(name, 'x', { timeoutMs: 100 }),
    respond: () => bus.requestReply.respond(name, () => ''),
    get: () => bus.kv.get(name, 'k'),
    put: () => bus.kv.put(name, 'k', 'x'),
    cas: () => bus.kv.cas(name, 'k', 'x', null),
    delete: () => bus.kv.delete(name, 'k'),
    keys: async () => drain(bus.kv.keys(name)),
    lease: () => bus.kv.lease(name, 'k', 1_000),
    enqueue: () => bus.jobs.enqueue(name, { payload: 'x' }),
    'enqueueMany of none': () => bus.jobs.enqueueMany(name, []),
    enqueueMany: () => bus.jobs.enqueueMany(name, [{ payload: 'x' }]),
    claim: () => bus.jobs.claim(name, 'w', 1_000),
    claimMany: () => bus.jobs.claimMany(name, 'w', 1_000, { limit: 1 }),
    queues: () => bus.admin.queues(),
    jobs: () => drain(bus.admin.jobs({ queue: name })),
    job: () => bus.admin.job('1'),
    retryJob: () => bus.admin.retryJob(name),
    retryDead: () => bus.admin.retryDead(name),
    cancelJob: () => bus.admin.cancelJob(name),
    removeJob: () => bus.admin.removeJob(name),
    purgeQueue: () => bus.admin.purgeQueue(name),
    pauseQueue: () => bus.admin.pauseQueue(name),
    resumeQueue: () => bus.admin.resumeQueue(name),
    durables: () => bus.admin.durables(),
    seekDurable: () => bus.admin.seekDurable(name, 'all'),
    purgeMessages: () => bus.admin.purgeMessages(name),
    buckets: () => bus.admin.buckets(),
    ...(bus.supports.watch ? { watch: () => bus.kv.watch(name) } : {}),
  }
}

export function lifecycleTests<Tx>(suite: Suite<Tx>): void {
  suite.group('close', () => {
    suite.test('close: afterwards every call rejects with closed', async (stage) => {
      const bus = await stage.open()
      await bus.close()
      for (const call of Object.values(calls(bus))) await rejects(call(), 'closed')
    })

    suite.test('close is idempotent, also at the same moment, and disposal is the same', async (stage) => {
      const bus = await stage.open()
      await Promise.all([bus.close(), bus.close()])
      await bus.close()
      await bus[Symbol.asyncDispose]()
      const other = await stage.open()
      {
        await using disposed = other
        await disposed.kv.get(unique('b'), 'k')
      }
      await rejects(other.kv.get('b', 'k'), 'closed')
    })

    suite.test('close of one handle leaves the others alone', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const { next } = await stage.subscribe(other, subject, unique('d'))
      await stage.subscribe(bus, subject, unique('d'))
      await bus.close()
      await other.pubsub.publish(subject, 'x')
      assert.equal(text((await next()).payload), 'x')
    })

    suite.test('close right after opening, and beside running calls, resolves; the calls end', async (stage) => {
      await (await stage.open()).close()
      // Where a call of several steps is when the bus is closed is chance.
      for (let round = 0; round < CLOSE_ROUNDS; round++) {
        const bus = await stage.open()
        const running = Object.entries(calls(bus)).map(async ([name, call]) => {
          const error = await within(call(), 3_000, `the end of ${name}`).catch((reason: unknown) => reason)
          if (error instanceof Error) assert.ok(error instanceof BusError, `${name}: ${error.message}`)
        })
        await Promise.all([bus.close(), ...running])
      }
    })

    suite.test('close ends open streams without throwing', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const waiting = await stage.subscribe(bus, subject, unique('d'))
      const stream = await bus.pubsub.subscribe(subject, unique('d'))
      const loop = (async () => {
        for await (const message of stream) await message.ack()
        return 'ended'
      })()
      await bus.pubsub.publish(subject, 'x')
      await (await waiting.next()).ack()
      void waiting.reader.ask()
      await bus.close()
      await waiting.reader.ended()
      assert.equal(await within(loop, PATIENCE_MS, 'the end of the loop'), 'ended')
    })

    suite.where('watch', 'close ends open watches without throwing', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      await bus.kv.put(bucket, 'k', 'x')
      const fresh = new Reader<KvChange>(await bus.kv.watch(bucket))
      const waiting = new Reader<KvChange>(await bus.kv.watch(bucket, undefined, { updatesOnly: true }))
      await fresh.next()
      void waiting.ask()
      await bus.close()
      await fresh.ended(1_000)
      await waiting.ended(1_000)
    })

    suite.test('close ends everything that waits within a second', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const [queue, bucket, subject] = [unique('q'), unique('b'), unique('r')]
      await other.kv.lease(bucket, 'k', LONG_TTL_MS)
      const release = Promise.withResolvers<void>()
      stage.defer(() => release.resolve())
      const started = Promise.withResolvers<void>()
      await other.requestReply.respond(subject, async () => {
        started.resolve()
        await release.promise
        return ''
      })
      const waits = {
        claim: bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 30_000 }),
        claimMany: bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 2, waitMs: 30_000 }),
        lease: bus.kv.lease(bucket, 'k', LONG_TTL_MS, { waitMs: 30_000 }),
        request: bus.requestReply.request(subject, '', { timeoutMs: 30_000 }),
      }
      const outcomes = Promise.allSettled(Object.values(waits))
      await started.promise
      await pause(50)
      const closing = bus.close()
      const [claim, claimMany, lease, request] = await withinASecond(outcomes, other, 'the end of the waits')
      for (const outcome of [claim, claimMany, lease, request]) {
        if (outcome?.status === 'rejected') await rejects(Promise.reject(outcome.reason), 'closed')
      }
      assert.ok(lease?.status === 'rejected' && request?.status === 'rejected', 'a lease or a reply that is not there cannot be answered')
      await closing
    })

    suite.test('close hands back messages, jobs and leases at once', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const [subject, durable, queue, bucket] = [unique('p'), unique('d'), unique('q'), unique('b')]
      await bus.pubsub.publish(subject, 'x')
      await bus.jobs.enqueueMany(queue, [{ payload: '1' }, { payload: '2' }])
      const { next } = await stage.subscribe(bus, subject, durable)
      await next()
      const jobs = await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 2 })
      const lease = await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
      const waiting = await stage.subscribe(other, subject, durable)
      const claiming = other.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 20_000 })
      void waiting.reader.ask()
      await bus.close()
      await waiting.next(2_000)
      assert.ok(await within(claiming, 2_000, 'the job'))
      assert.ok(await other.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 2_000 }))
      await other.kv.lease(bucket, 'k', LONG_TTL_MS)
      for (const job of jobs) assert.equal(job.lease.signal.aborted, true)
      assert.equal(lease.signal.aborted, true)
    })

    suite.test('close: what is held cannot be settled any more, and says closed', async (stage) => {
      const bus = await stage.open()
      const [subject, queue, bucket] = [unique('p'), unique('q'), unique('b')]
      await bus.pubsub.publish(subject, 'x')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const { next } = await stage.subscribe(bus, subject, unique('d'))
      const message = await next()
      const job = await bus.jobs.claim(queue, 'w', LONG_TTL_MS)
      const lease = await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
      await bus.close()
      for (const settle of [() => message.ack(), () => message.nak(), () => message.term(), () => message.extend()])
        await rejects(settle(), 'closed')
      for (const settle of [() => job!.ack(), () => job!.nak(), () => job!.deadLetter('r'), () => job!.heartbeat()])
        await rejects(settle(), 'closed')
      const error = await lease.heartbeat().catch((reason: unknown) => reason)
      assert.ok(error instanceof BusError && ['closed', 'lease_lost'].includes(error.code), String(error))
      await lease.release()
      await job!.lease.release()
    })

    suite.test('close takes responders away and aborts the signals of their requests', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('r')
      const started = Promise.withResolvers<AbortSignal>()
      const responder = await bus.requestReply.respond(subject, async ({ signal }) => {
        started.resolve(signal)
        await new Promise<void>((resolve) => signal.addEventListener('abort', () => resolve(), { once: true }))
        return ''
      })
      const request = other.requestReply.request(subject, '', { timeoutMs: 1_500 }).catch(() => {})
      const signal = await started.promise
      await within(bus.close(), 3_000, 'the close')
      assert.equal(signal.aborted, true)
      await rejects(other.requestReply.request(subject, '', { timeoutMs: 1_000 }), 'not_found')
      await responder.close()
      await request
    })

    suite.test('close does not wait for a responder whose own close waits for its handler', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('r')
      const started = Promise.withResolvers<void>()
      const release = Promise.withResolvers<void>()
      stage.defer(() => release.resolve())
      const responder = await bus.requestReply.respond(subject, async () => {
        started.resolve()
        await release.promise
        return ''
      })
      const asked = other.requestReply.request(subject, '', { timeoutMs: 30_000 }).catch(() => {})
      await started.promise
      const closing = responder.close()
      // It takes no more once that is known, and waits.
      await eventually(
        () => other.requestReply.request(subject, '', { timeoutMs: 200 }).catch((error: unknown) => isBusError(error, 'not_found')),
        'the responder counting no more',
      )
      for (let turn = 0; turn < 10; turn++) await bus.kv.get('b', 'k')
      await within(bus.close(), 3_000, 'close')
      release.resolve()
      await within(closing, 3_000, 'the end of the responder')
      await other.close()
      await asked
    })

    suite.test('close loses nothing that resolved before it', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const [subject, queue, bucket] = [unique('p'), unique('q'), unique('b')]
      const { next } = await stage.subscribe(other, subject, unique('d'))
      await Promise.all([bus.pubsub.publish(subject, 'x'), bus.jobs.enqueue(queue, { payload: 'x' }), bus.kv.put(bucket, 'k', 'x')])
      await bus.close()
      assert.equal(text((await next()).payload), 'x')
      assert.ok(await other.jobs.claim(queue, 'w', LONG_TTL_MS))
      sameBytes((await other.kv.get(bucket, 'k'))!.value, 'x')
    })

    suite.test('close of a stream, watch, responder or lease after the bus closed does no harm', async (stage) => {
      const bus = await stage.open()
      const stream = await bus.pubsub.subscribe(unique('p'), unique('d'))
      const responder = await bus.requestReply.respond(unique('r'), () => '')
      const lease = await bus.kv.lease(unique('b'), 'k', LONG_TTL_MS)
      const watch = bus.supports.watch ? await bus.kv.watch(unique('b')) : undefined
      await bus.close()
      await Promise.all([stream.close(), responder.close(), lease.release(), watch?.close()])
    })
  })
}

/** Worker, which runs on JobQueue alone and so behaves alike on every backend. */

import assert from 'node:assert/strict'
import type { ClaimedJob } from '../../core/types.ts'
import { Worker } from '../../runtime/worker.ts'
import { eventually, pause, QUIET_MS, rejects, type Suite, text, unique, within, withinASecond } from './kit.ts'

const LONG_TTL_MS = 60_000

export function workerTests<Tx>(suite: Suite<Tx>): void {
  suite.group('Worker', () => {
    suite.test('Worker acks a job when its handler returns', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const seen: string[] = []
      await bus.jobs.enqueue(queue, { payload: 'before' })
      await using worker = new Worker(
        bus.jobs,
        queue,
        async (job, signal) => {
          assert.ok(signal instanceof AbortSignal && !signal.aborted)
          seen.push(text(job.payload))
        },
        { leaseTtlMs: 5_000 },
      )
      await bus.jobs.enqueue(queue, { payload: 'after' })
      await eventually(async () => seen.length === 2, 'two jobs')
      await worker.stop()
      assert.deepEqual(seen, ['before', 'after'])
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: QUIET_MS }), null)
    })

    suite.test('Worker naks with backoff when its handler throws, and tells onError with the job', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const told: { error: unknown; job?: ClaimedJob | undefined }[] = []
      const runs: { readonly attempt: number; readonly at: number }[] = []
      const failure = new Error('the first time')
      const id = await bus.jobs.enqueue(queue, { payload: 'x' })
      await using _worker = new Worker(
        bus.jobs,
        queue,
        async (job) => {
          runs.push({ attempt: job.attempt, at: performance.now() })
          if (job.attempt === 1) throw failure
        },
        { onError: (error, job) => told.push({ error, job }) },
      )
      await eventually(async () => runs.length === 2, 'the second run')
      assert.deepEqual(
        runs.map(({ attempt }) => attempt),
        [1, 2],
      )
      assert.ok(runs[1]!.at - runs[0]!.at >= 100, 'not at once')
      assert.equal(told.length, 1)
      assert.equal(told[0]!.error, failure)
      assert.equal(told[0]!.job?.id, id)
    })

    suite.test('Worker leaves the dead letter of a job that always fails, with the error of the last run', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts: 1 })
      await using _worker = new Worker(
        bus.jobs,
        queue,
        async () => {
          throw new Error('cannot work')
        },
        { onError: () => {} },
      )
      const { headers } = await letters.next()
      assert.deepEqual([headers.dlq_reason, headers.dlq_attempts], ['max_attempts_exceeded', '1'])
      assert.match(headers.dlq_error ?? '', /cannot work/)
    })

    suite.test('Worker goes on after a handler threw whatever it threw, and after an onError that throws', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const thrown: unknown[] = [undefined, null, 'text', Object.create(null), Symbol('s'), new Error('\0\ud800 odd')]
      let done = 0
      let told = 0
      await bus.jobs.enqueueMany(
        queue,
        [...thrown.keys(), 'last'].map((payload) => ({ payload: `${payload}`, maxAttempts: 1 })),
      )
      await using _worker = new Worker(
        bus.jobs,
        queue,
        async (job) => {
          const payload = text(job.payload)
          if (payload !== 'last') throw thrown[Number(payload)]
          done++
        },
        {
          onError: () => {
            told++
            throw new Error('a listener of no use')
          },
        },
      )
      await eventually(async () => done === 1, 'the last job')
      assert.equal(told, thrown.length)
    })

    suite.test('Worker leaves a job alone that its handler settled itself', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      const errors: unknown[] = []
      const runs: string[] = []
      await bus.jobs.enqueueMany(
        queue,
        ['ack', 'nak', 'dead', 'ack and throw'].map((payload) => ({ payload })),
      )
      await using worker = new Worker(
        bus.jobs,
        queue,
        async (job) => {
          const payload = text(job.payload)
          runs.push(`${payload} ${job.attempt}`)
          if (job.attempt > 1) return
          if (payload.startsWith('ack')) await job.ack()
          if (payload === 'nak') await job.nak(0)
          if (payload === 'dead') await job.deadLetter('by the handler')
          if (payload.endsWith('throw')) throw new Error('after the ack')
        },
        { onError: (error) => errors.push(error) },
      )
      await eventually(async () => runs.length === 5, 'five runs')
      assert.equal((await letters.next()).headers.dlq_reason, 'by the handler')
      await pause(QUIET_MS)
      await worker.stop()
      assert.deepEqual(runs.toSorted(), ['ack 1', 'ack and throw 1', 'dead 1', 'nak 1', 'nak 2'])
      assert.deepEqual(
        errors.map((error) => (error as Error).message),
        ['after the ack'],
      )
    })

    suite.test('Worker handles as many jobs at once as its concurrency says', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      let [running, most, done] = [0, 0, 0]
      const barrier = Promise.withResolvers<void>()
      await bus.jobs.enqueueMany(
        queue,
        Array.from({ length: 9 }, () => ({ payload: 'x' })),
      )
      await using _worker = new Worker(
        bus.jobs,
        queue,
        async () => {
          most = Math.max(most, ++running)
          await barrier.promise
          running--
          done++
        },
        { concurrency: 3 },
      )
      await eventually(async () => running === 3, 'three at once')
      await pause(150)
      assert.equal((await bus.jobs.claimMany(queue, 'w', 500, { limit: 20 })).length, 6, 'it claims no more than it handles')
      barrier.resolve()
      await eventually(async () => done === 9, 'nine jobs')
      assert.equal(most, 3)
    })

    suite.test('Worker handles one job at a time unless it is told otherwise', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      let [running, most, done] = [0, 0, 0]
      await bus.jobs.enqueueMany(
        queue,
        Array.from({ length: 5 }, () => ({ payload: 'x' })),
      )
      await using _worker = new Worker(bus.jobs, queue, async () => {
        most = Math.max(most, ++running)
        await pause(10)
        running--
        done++
      })
      await eventually(async () => done === 5, 'five jobs')
      assert.equal(most, 1)
    })

    suite.test('Worker heartbeats while the handler runs, so that nobody else gets the job', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      let aborted: boolean | undefined
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const started = Promise.withResolvers<void>()
      await using worker = new Worker(
        bus.jobs,
        queue,
        async (_job, signal) => {
          started.resolve()
          await pause(3_000)
          aborted = signal.aborted
        },
        { leaseTtlMs: 1_000 },
      )
      await started.promise
      assert.equal(await other.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 2_500 }), null)
      await eventually(async () => aborted !== undefined, 'the end of the handler')
      await worker.stop()
      assert.equal(aborted, false)
      assert.equal(await other.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: QUIET_MS }), null)
    })

    suite.test('Worker aborts the signal of the handler when the lease is lost', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const id = await bus.jobs.enqueue(queue, { payload: 'x' })
      const told: unknown[] = []
      const aborted = Promise.withResolvers<void>()
      const started = Promise.withResolvers<void>()
      const stolen = Promise.withResolvers<void>()
      stage.defer(() => stolen.resolve())
      // As with a process that was stopped for longer than its lease: the heartbeats do not reach the server.
      const deaf = new Proxy(bus.jobs, {
        get: (jobs, name) => {
          if (name !== 'claimMany') return Reflect.get(jobs, name).bind(jobs)
          return async (...args: Parameters<typeof jobs.claimMany>) =>
            (await jobs.claimMany(...args)).map(
              (job) =>
                new Proxy(job, {
                  get: (held, property) => {
                    if (property === 'heartbeat') return async () => {}
                    const value = Reflect.get(held, property, held)
                    return typeof value === 'function' ? value.bind(held) : value
                  },
                }),
            )
        },
      })
      const worker = new Worker(
        deaf,
        queue,
        async (_job, signal) => {
          started.resolve()
          await new Promise<void>((resolve) => signal.addEventListener('abort', () => resolve(), { once: true }))
          aborted.resolve()
          await stolen.promise
        },
        { leaseTtlMs: 500, onError: (error) => told.push(error) },
      )
      stage.defer(() => worker.stop({ graceMs: 0 }))
      await started.promise
      const next = await bus.jobs.claim(queue, 'thief', LONG_TTL_MS, { waitMs: 8_000 })
      assert.equal(next?.attempt, 2)
      await within(aborted.promise, 3_000, 'the abort')
      stolen.resolve()
      await worker.stop()
      assert.equal(next?.id, id)
      await next?.ack()
      assert.equal(told.length, 1, 'the lost ack is told')
    })

    suite.test('Worker.stop lets running handlers end and claims no more', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueueMany(queue, [{ payload: 'running' }, { payload: 'left' }])
      const started = Promise.withResolvers<void>()
      const ended: string[] = []
      const worker = new Worker(bus.jobs, queue, async (job, signal) => {
        started.resolve()
        await pause(400)
        assert.equal(signal.aborted, false)
        ended.push(text(job.payload))
      })
      stage.defer(() => worker.stop({ graceMs: 0 }))
      await started.promise
      await Promise.all([worker.stop(), worker.stop()])
      await worker.stop()
      assert.deepEqual(ended, ['running'])
      await bus.jobs.enqueue(queue, { payload: 'later' })
      const left = await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 5 })
      assert.deepEqual(
        left.map(({ payload, attempt }) => [text(payload), attempt]),
        [
          ['left', 1],
          ['later', 1],
        ],
      )
    })

    suite.test('Worker.stop naks what does not end within graceMs, and aborts its signal', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const started = Promise.withResolvers<void>()
      let signal: AbortSignal | undefined
      const release = Promise.withResolvers<void>()
      stage.defer(() => release.resolve())
      const worker = new Worker(
        bus.jobs,
        queue,
        async (_job, handed) => {
          signal = handed
          started.resolve()
          await release.promise
        },
        { onError: () => {} },
      )
      stage.defer(() => worker.stop({ graceMs: 0 }))
      await started.promise
      const start = performance.now()
      await within(worker.stop({ graceMs: 300 }), 3_000, 'the stop')
      assert.ok(performance.now() - start >= 290)
      assert.equal(signal?.aborted, true)
      const job = await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 2_000 })
      assert.equal(job?.attempt, 2)
      release.resolve()
      await pause(50)
      await job?.heartbeat()
    })

    suite.test('Worker.stop ends a worker that waits for jobs within a second', async (stage) => {
      const bus = await stage.open()
      const worker = new Worker(bus.jobs, unique('q'), async () => {})
      await pause(50)
      await withinASecond(worker.stop(), bus, 'the stop')
    })

    suite.test('Worker ends when its bus closes, aborts the signal, and its job goes to others at once', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const started = Promise.withResolvers<AbortSignal>()
      const worker = new Worker(
        bus.jobs,
        queue,
        async (_job, signal) => {
          started.resolve(signal)
          await new Promise<void>((resolve) => signal.addEventListener('abort', () => resolve(), { once: true }))
        },
        { onError: () => {} },
      )
      stage.defer(() => worker.stop({ graceMs: 0 }))
      const signal = await started.promise
      await bus.close()
      assert.ok(await other.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 2_000 }))
      await eventually(async () => signal.aborted, 'the abort', 3_000)
      await within(worker.stop(), 2_000, 'the stop')
    })

    suite.test('Worker checks its arguments', async (stage) => {
      const bus = await stage.open()
      const make =
        (...args: unknown[]) =>
        async () => {
          const worker = Reflect.construct(Worker, args) as Worker<Tx>
          await worker.stop({ graceMs: 0 })
        }
      const handler = async () => {}
      await rejects(make(undefined, 'q', handler)(), 'invalid_argument', 'jobs')
      await rejects(make(bus.jobs, 'no queue', handler)(), 'invalid_argument', 'queue')
      await rejects(make(bus.jobs, 'q', 'handler')(), 'invalid_argument', 'handler')
      for (const concurrency of [0, -1, 1.5, Number.NaN])
        await rejects(make(bus.jobs, 'q', handler, { concurrency })(), 'invalid_argument', 'concurrency')
      for (const leaseTtlMs of [-1, 1.5, Number.NaN, 2_147_483_648])
        await rejects(make(bus.jobs, 'q', handler, { leaseTtlMs })(), 'invalid_argument', 'leaseTtlMs')
      await rejects(make(bus.jobs, 'q', handler, { workerId: '' })(), 'invalid_argument', 'workerId')
    })
  })
}

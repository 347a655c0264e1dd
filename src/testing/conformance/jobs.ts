/** Enqueueing and claiming: J1, J2, J7, J8. How a claim ends: job-endings.ts. */

import assert from 'node:assert/strict'
import type { Bus, ClaimedJob } from '../../core/types.ts'
import {
  eventually,
  ODD_HEADERS,
  oddPayloads,
  pause,
  QUIET_MS,
  rejects,
  type Suite,
  sameBytes,
  sameHeaders,
  sorted,
  TICK_MS,
  text,
  timed,
  unique,
  within,
  withinASecond,
} from './kit.ts'

/** Not over while a test runs. */
const LONG_TTL_MS = 60_000

/** Claims one that must be there. */
async function claimed<Tx>(bus: Bus<Tx>, queue: string, waitMs = 0): Promise<ClaimedJob<Tx>> {
  const job = await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs })
  assert.ok(job, 'a job was due')
  return job
}

export function jobTests<Tx>(suite: Suite<Tx>): void {
  suite.group('enqueue and claim', () => {
    suite.test('J1 an enqueued job is claimed with everything that was handed in', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      const id = await bus.jobs.enqueue(queue, { payload: 'work', headers: { colour: 'red' }, maxAttempts: 3 })
      assert.ok(typeof id === 'string' && id.length > 0)
      const before = Date.now()
      const job = await claimed(other, queue)
      assert.equal(job.id, id)
      assert.equal(job.queue, queue)
      sameBytes(job.payload, 'work')
      sameHeaders(job.headers, { colour: 'red' })
      assert.equal(job.attempt, 1)
      assert.equal(job.maxAttempts, 3)
      assert.ok(Number.isSafeInteger(job.lease.fence))
      assert.ok(Math.abs(job.lease.expiresAt.getTime() - before - LONG_TTL_MS) < 30_000)
      assert.equal(job.lease.signal.aborted, false)
      await job.ack()
    })

    suite.test('J1 five attempts are the default', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: '' })
      assert.equal((await claimed(bus, queue)).maxAttempts, 5)
    })

    suite.test('J1 payloads and headers come back as they were', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      for (const { payload, bytes } of oddPayloads()) {
        await bus.jobs.enqueue(queue, { payload, headers: ODD_HEADERS })
        const job = await claimed(bus, queue)
        sameBytes(job.payload, bytes)
        sameHeaders(job.headers, ODD_HEADERS)
        await job.ack()
      }
    })

    suite.test('J1 a buffer may be reused as soon as enqueue has returned its promise', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const buffer = Uint8Array.of(1, 2)
      const enqueued = bus.jobs.enqueue(queue, { payload: buffer })
      buffer.fill(0)
      await enqueued
      sameBytes((await claimed(bus, queue)).payload, Uint8Array.of(1, 2))
    })

    suite.test('J1 enqueueMany answers the ids in the order of the jobs', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      assert.deepEqual(await bus.jobs.enqueueMany(queue, []), [])
      const ids = await bus.jobs.enqueueMany(
        queue,
        Array.from({ length: 30 }, (_, index) => ({ payload: `${index}` })),
      )
      assert.equal(new Set(ids).size, 30)
      const jobs = await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 100 })
      assert.equal(jobs.length, 30)
      for (const job of jobs) assert.equal(job.id, ids[Number(text(job.payload))])
    })

    suite.test('J1 enqueueMany with one bad job enqueues none of them', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await rejects(
        bus.jobs.enqueueMany(queue, [{ payload: 'good' }, { payload: 'bad', maxAttempts: 0 }]),
        'invalid_argument',
        'maxAttempts',
      )
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS), null)
    })

    suite.test('J1 queues are told apart by every character', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const names = [queue, `${queue}.a`, `${queue}.A`, `${queue}_a`, `${queue}-a`, `${queue}.a.b`]
      for (const name of names) await bus.jobs.enqueue(name, { payload: name })
      for (const name of names) {
        sameBytes((await claimed(bus, name)).payload, name)
        assert.equal(await bus.jobs.claim(name, 'w', LONG_TTL_MS), null)
      }
    })

    suite.test('J2 a claimed job is not claimed by anybody else', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      await claimed(bus, queue)
      for (const handle of [bus, other]) assert.equal(await handle.jobs.claim(queue, 'other', LONG_TTL_MS), null)
      assert.deepEqual(await other.jobs.claimMany(queue, 'other', LONG_TTL_MS, { limit: 10 }), [])
    })

    suite.test('J2 of concurrent claims for one job one gets it', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const queue = unique('q')
      await buses[0]!.jobs.enqueue(queue, { payload: 'x' })
      const claims = await Promise.all(
        Array.from({ length: 16 }, (_, index) => buses[index % 2]!.jobs.claim(queue, `w${index}`, LONG_TTL_MS)),
      )
      assert.equal(claims.filter((job) => job !== null).length, 1)
    })

    suite.test('J2 concurrent workers never get the same job, and get all of them', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const queue = unique('q')
      const ids = await buses[0]!.jobs.enqueueMany(
        queue,
        Array.from({ length: 120 }, (_, index) => ({ payload: `${index}` })),
      )
      const seen: string[] = []
      await Promise.all(
        Array.from({ length: 8 }, async (_, index) => {
          const bus = buses[index % 2]!
          for (;;) {
            const jobs =
              index % 3 === 0
                ? await bus.jobs.claimMany(queue, `w${index}`, LONG_TTL_MS, { limit: 7 })
                : [await bus.jobs.claim(queue, `w${index}`, LONG_TTL_MS)].filter((job) => job !== null)
            if (jobs.length === 0) return
            for (const job of jobs) {
              seen.push(job.id)
              await job.ack()
            }
          }
        }),
      )
      // What was locked at the moment a worker looked may be left over for the next look.
      for (let job = await buses[0]!.jobs.claim(queue, 'w', LONG_TTL_MS); job; job = await buses[0]!.jobs.claim(queue, 'w', LONG_TTL_MS)) {
        seen.push(job.id)
        await job.ack()
      }
      assert.deepEqual(sorted(seen), sorted(ids))
    })

    suite.test('J2 claimMany claims at most its limit', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueueMany(
        queue,
        Array.from({ length: 5 }, (_, index) => ({ payload: `${index}` })),
      )
      const first = await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 3 })
      const second = await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 3 })
      assert.deepEqual([first.length, second.length], [3, 2])
      await first[0]!.ack()
      await first[1]!.nak(0)
      assert.deepEqual(
        (await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 3 })).map(({ id }) => id),
        [first[1]!.id],
      )
    })
  })

  suite.group('waiting claims', () => {
    suite.test('J7 claim answers null at once when nothing is claimable', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const ms = await timed(async () => {
        assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS), null)
        assert.deepEqual(await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 3 }), [])
      })
      assert.ok(ms < 2_000)
    })

    suite.test('J7 claim waits for waitMs, and then answers null', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const ms = await timed(async () => {
        const [one, many] = await Promise.all([
          bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 500 }),
          bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { waitMs: 500, limit: 2 }),
        ])
        assert.deepEqual([one, many], [null, []])
      })
      assert.ok(ms >= 500 - TICK_MS && ms < 3_000, `took ${ms} ms`)
    })

    suite.test('J7 a waiting claim gets a job as soon as one comes in', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      for (const enqueuer of [bus, other]) {
        const waiting = bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 20_000 })
        assert.equal(await Promise.race([waiting, pause(150)]), undefined)
        await enqueuer.jobs.enqueue(queue, { payload: 'x' })
        const job = await within(waiting, 2_000, 'the job')
        await job?.ack()
        assert.ok(job)
      }
    })

    suite.test('J7 a waiting claim gets a job as soon as its delay ends', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const asked = performance.now()
      await bus.jobs.enqueue(queue, { payload: 'x', delayMs: 700 })
      const enqueued = performance.now()
      await claimed(bus, queue, 20_000)
      assert.ok(performance.now() - asked >= 700 - TICK_MS)
      assert.ok(performance.now() - enqueued <= 700 + 1_500)
    })

    suite.test('J7 a waiting claim gets a job as soon as its lease runs out', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const asked = performance.now()
      assert.ok(await bus.jobs.claim(queue, 'w', 700))
      const granted = performance.now()
      const job = await claimed(other, queue, 20_000)
      assert.equal(job.attempt, 2)
      assert.ok(performance.now() - asked >= 700 - TICK_MS)
      assert.ok(performance.now() - granted <= 700 + 1_500)
    })

    suite.test('J7 a waiting claim gets a job as soon as another worker naks it', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const job = await claimed(bus, queue)
      const waiting = other.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 20_000 })
      assert.equal(await Promise.race([waiting, pause(100)]), undefined)
      await job.nak(0)
      assert.equal((await within(waiting, 2_000, 'the job'))?.attempt, 2)
    })

    suite.test('J7 who waits in vain for a job that another got has it when that lease runs out', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const queue = unique('q')
      const waiting = buses.map((bus, index) => bus.jobs.claim(queue, `w${index}`, 500, { waitMs: 20_000 }))
      await pause(100)
      await buses[0]!.jobs.enqueue(queue, { payload: 'x' })
      await within(Promise.race(waiting), 2_000, 'the first claim')
      const attempts = await within(Promise.all(waiting), 500 + 2_000, 'the second claim')
      assert.deepEqual(sorted(attempts.map((job) => job?.attempt)), [1, 2])
    })

    suite.test('J7 a job is given to one of several that wait, and the others go on waiting', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const queue = unique('q')
      const got: string[] = []
      const waiting = Array.from({ length: 4 }, async (_, index) => {
        const job = await buses[index % 2]!.jobs.claim(queue, `w${index}`, LONG_TTL_MS, { waitMs: 20_000 })
        if (job) got.push(job.id)
        await job?.ack()
      })
      await pause(100)
      const ids: string[] = []
      for (let count = 1; count <= 4; count++) {
        ids.push(await buses[0]!.jobs.enqueue(queue, { payload: 'x' }))
        await eventually(async () => got.length === count, `${count} jobs`)
      }
      await Promise.all(waiting)
      assert.deepEqual(got, ids)
    })

    suite.test('J7 an abort ends the waiting at once, and takes no job along', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const controller = new AbortController()
      const options = { waitMs: 20_000, signal: controller.signal }
      const waiting = Promise.allSettled([
        bus.jobs.claim(queue, 'w', LONG_TTL_MS, options),
        bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { ...options, limit: 2 }),
      ])
      await pause(50)
      controller.abort()
      await withinASecond(waiting, bus, 'the end of the waiting')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      assert.equal((await claimed(bus, queue)).attempt, 1)
    })

    suite.test('J7 a claim waits for 30 seconds at the most', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      await rejects(bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 30_001 }), 'invalid_argument', 'waitMs')
      await rejects(bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 1, waitMs: 30_001 }), 'invalid_argument', 'waitMs')
      assert.equal((await claimed(bus, queue, 30_000)).attempt, 1)
    })
  })

  suite.group('order and delay', () => {
    suite.test('J8 within a priority the job that has waited longest goes first', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      const ids: string[] = []
      for (let index = 0; index < 6; index++) ids.push(await (index % 2 ? bus : other).jobs.enqueue(queue, { payload: `${index}` }))
      ids.push(...(await bus.jobs.enqueueMany(queue, [{ payload: '6' }, { payload: '7' }])))
      const order: string[] = []
      for (let count = 0; count < 4; count++) order.push((await claimed(bus, queue)).id)
      order.push(...(await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 10 })).map(({ id }) => id))
      assert.deepEqual(order, ids)
    })

    suite.where('priorities', 'J8 higher priority goes first', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      for (const priority of [0, -100, 5, 100, 5, undefined, -1]) {
        await bus.jobs.enqueue(queue, { payload: `${priority}`, ...(priority === undefined ? {} : { priority }) })
      }
      const order: string[] = []
      for (let count = 0; count < 3; count++) order.push(text((await claimed(bus, queue)).payload))
      order.push(...(await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 10 })).map(({ payload }) => text(payload)))
      assert.deepEqual(order, ['100', '5', '5', '0', 'undefined', '-1', '-100'])
    })

    suite.where('priorities', 'J8 a job that comes in later with a higher priority goes before those that wait', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueueMany(queue, [{ payload: 'a' }, { payload: 'b' }])
      assert.equal(text((await claimed(bus, queue)).payload), 'a')
      await bus.jobs.enqueue(queue, { payload: 'urgent', priority: 1 })
      assert.equal(text((await claimed(bus, queue)).payload), 'urgent')
      assert.equal(text((await claimed(bus, queue)).payload), 'b')
    })

    suite.where('priorities', 'J8 a delayed job of high priority holds up nobody', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueueMany(queue, [
        { payload: 'later', priority: 100, delayMs: 60_000 },
        { payload: 'now', priority: -100 },
      ])
      assert.equal(text((await claimed(bus, queue)).payload), 'now')
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS), null)
    })

    suite.without('priorities', 'J8 a priority is unsupported here, and says so', async (stage) => {
      const bus = await stage.open()
      await rejects(bus.jobs.enqueue(unique('q'), { payload: 'x', priority: 1 }), 'unsupported')
    })

    suite.test('J8 a delayed job is not claimable before its time, whichever way it is given', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const asked = performance.now()
      await bus.jobs.enqueueMany(queue, [
        { payload: 'delayMs', delayMs: 800 },
        { payload: 'runAt', runAt: new Date(Date.now() + 800) },
        { payload: 'far', runAt: new Date(Date.now() + 10 * 365 * 86_400_000) },
        { payload: 'now', delayMs: 0 },
        { payload: 'past', runAt: new Date(0) },
      ])
      const order: string[] = []
      while (order.length < 4) {
        order.push(text((await claimed(bus, queue, 10_000)).payload))
        const tookMs = performance.now() - asked
        // Once all are due, which of them goes first is another rule.
        if (tookMs < 800 - 50) assert.ok(['now', 'past'].includes(order.at(-1)!), `${order.at(-1)} came after ${tookMs} ms`)
      }
      assert.deepEqual(sorted(order), ['delayMs', 'now', 'past', 'runAt'])
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: QUIET_MS }), null)
    })

    suite.test('J8 delayMs and runAt exclude one another', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await rejects(bus.jobs.enqueue(queue, { payload: 'x', delayMs: 1, runAt: new Date() }), 'invalid_argument', /delayMs|runAt/)
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 50 }), null)
    })
  })
}

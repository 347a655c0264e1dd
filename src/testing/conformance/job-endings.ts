/** How a claim ends: leases, attempts, dead letters and fencing: J3, J4, J6. */

import assert from 'node:assert/strict'
import type { Bus, ClaimedJob } from '../../core/types.ts'
import {
  eventually,
  PATIENCE_MS,
  pause,
  QUIET_MS,
  rejects,
  type Suite,
  sameBytes,
  sameHeaders,
  succeeds,
  TICK_MS,
  text,
  unique,
  within,
} from './kit.ts'

/** Not over while a test runs. */
const LONG_TTL_MS = 60_000
const SHORT_TTL_MS = 300

async function claimed<Tx>(bus: Bus<Tx>, queue: string, options: { ttlMs?: number; waitMs?: number } = {}): Promise<ClaimedJob<Tx>> {
  const { ttlMs = LONG_TTL_MS, waitMs = PATIENCE_MS } = options
  const job = await bus.jobs.claim(queue, 'w', ttlMs, { waitMs })
  assert.ok(job, 'a job was due')
  return job
}

async function none<Tx>(bus: Bus<Tx>, queue: string, forMs = QUIET_MS): Promise<void> {
  const job = await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: forMs })
  assert.equal(job, null, `no job was due, but attempt ${job?.attempt} of one came`)
}

export function jobEndingTests<Tx>(suite: Suite<Tx>): void {
  suite.group('leases and attempts', () => {
    suite.test('J3 a lease that runs out makes the job claimable again, and not before', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      const id = await bus.jobs.enqueue(queue, { payload: 'x', headers: { h: '1' } })
      const asked = performance.now()
      const first = await claimed(bus, queue, { ttlMs: 700 })
      const second = await claimed(other, queue)
      assert.ok(performance.now() - asked >= 700 - TICK_MS)
      assert.deepEqual([first.attempt, second.attempt, second.id], [1, 2, id])
      sameBytes(second.payload, 'x')
      sameHeaders(second.headers, { h: '1' })
      assert.ok(second.lease.fence > first.lease.fence, 'the fence grows with every claim')
    })

    suite.test('J3 a job whose worker dies each time has exactly maxAttempts runs and one dead letter', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      const letters = await stage.subscribe(other, `${queue}.dlq`, unique('d'))
      const id = await bus.jobs.enqueue(queue, { payload: 'x', headers: { h: '1' }, maxAttempts: 3, dedupKey: 'k' })
      for (const attempt of [1, 2, 3])
        assert.equal((await claimed(attempt % 2 ? bus : other, queue, { ttlMs: SHORT_TTL_MS })).attempt, attempt)
      await none(bus, queue, SHORT_TTL_MS + 600)
      const letter = await letters.next()
      sameBytes(letter.payload, 'x')
      // A backend may say that the lease ran out, as far as that is an error.
      const { dlq_error: _, ...headers } = letter.headers
      sameHeaders(headers, {
        h: '1',
        dlq_reason: 'max_attempts_exceeded',
        dlq_queue: queue,
        dlq_job_id: id,
        dlq_attempts: '3',
        dlq_dedup_key: 'k',
      })
      await letter.ack()
      await none(other, queue)
      await letters.nothing(500)
    })

    suite.test('J3 a job of one attempt runs once', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts: 1 })
      await claimed(bus, queue, { ttlMs: SHORT_TTL_MS })
      await none(bus, queue, SHORT_TTL_MS + 300)
      assert.equal((await letters.next()).headers.dlq_attempts, '1')
    })

    suite.test('J3 each of many exhausted jobs has one dead letter, however many claim at once', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const queue = unique('q')
      const letters = await stage.subscribe(buses[0]!, `${queue}.dlq`, unique('d'))
      const ids = await buses[0]!.jobs.enqueueMany(
        queue,
        Array.from({ length: 40 }, () => ({ payload: 'x', maxAttempts: 1 })),
      )
      assert.equal((await buses[0]!.jobs.claimMany(queue, 'w', SHORT_TTL_MS, { limit: 40 })).length, 40)
      await pause(SHORT_TTL_MS)
      const idle = Promise.all(Array.from({ length: 6 }, (_, index) => none(buses[index % 2]!, queue, 800)))
      const dead = (await letters.reader.take(40)).map(({ headers }) => headers.dlq_job_id)
      await idle
      assert.deepEqual(new Set(dead), new Set(ids))
      await letters.nothing()
    })

    suite.test('J3 the last attempt may take as long as its heartbeats keep its lease', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts: 1 })
      const job = await claimed(bus, queue, { ttlMs: 1_200 })
      for (let beat = 0; beat < 4; beat++) {
        await none(bus, queue, 400)
        await job.heartbeat()
      }
      await job.ack()
      await Promise.all([letters.nothing(), none(bus, queue)])
    })
  })

  suite.group('dead jobs', () => {
    suite.test('J4 a nak of the last attempt ends the job at once', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      const id = await bus.jobs.enqueue(queue, {
        payload: Uint8Array.of(0, 255),
        maxAttempts: 2,
        headers: { mine: '1', dlq_queue: 'not mine', dlq_from: 'kept' },
      })
      await (await claimed(bus, queue)).nak(0)
      await letters.nothing()
      await (await claimed(bus, queue)).nak(60_000)
      const letter = await letters.next()
      sameBytes(letter.payload, Uint8Array.of(0, 255))
      sameHeaders(letter.headers, {
        mine: '1',
        dlq_from: 'kept',
        dlq_reason: 'max_attempts_exceeded',
        dlq_queue: queue,
        dlq_job_id: id,
        dlq_attempts: '2',
      })
      await none(bus, queue)
      await letters.nothing()
    })

    suite.test('J4 what the last nak said went wrong goes along as dlq_error', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts: 2 })
      await (await claimed(bus, queue)).nak(0, { error: 'the first' })
      await (await claimed(bus, queue)).nak(0, { error: 'the disk\nis full' })
      const { headers } = await letters.next()
      assert.match(headers.dlq_error ?? '', /the disk\s*is full/)
      assert.equal(headers.dlq_reason, 'max_attempts_exceeded')
    })

    suite.test('J4 deadLetter ends the job at once, with the reason of the caller', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      const letters = await stage.subscribe(other, `${queue}.dlq`, unique('d'))
      const id = await bus.jobs.enqueue(queue, { payload: 'x', dedupKey: 'key 漢' })
      await (await claimed(bus, queue)).deadLetter('cannot be parsed: 漢字')
      const letter = await letters.next(2_000)
      sameBytes(letter.payload, 'x')
      assert.equal(letter.subject, `${queue}.dlq`)
      sameHeaders(letter.headers, {
        dlq_reason: 'cannot be parsed: 漢字',
        dlq_queue: queue,
        dlq_job_id: id,
        dlq_attempts: '1',
        dlq_dedup_key: 'key 漢',
      })
      await none(bus, queue)
      await letters.nothing()
    })

    suite.test('J4 a dead letter is a message like any other: durables that come later get it', async (stage) => {
      const bus = await stage.open()
      const queue = `${unique('q')}.sub`
      await bus.jobs.enqueue(queue, { payload: 'x' })
      await (await claimed(bus, queue)).deadLetter('r')
      const { next } = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      assert.equal((await next()).headers.dlq_reason, 'r')
    })

    suite.test('J4 a nak without a delay waits for a backoff, with a delay for that', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      await (await claimed(bus, queue)).nak()
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS), null, 'not claimable at once')
      const second = await claimed(bus, queue)
      assert.equal(second.attempt, 2)
      const naked = performance.now()
      await second.nak(600)
      const third = await claimed(bus, queue)
      assert.ok(performance.now() - naked >= 600 - TICK_MS)
      await third.nak(0)
      assert.equal((await claimed(bus, queue, { waitMs: 0 })).attempt, 4)
    })

    suite.test('J4 an acked job is gone and leaves no dead letter', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts: 1 })
      await (await claimed(bus, queue, { ttlMs: 1_000 })).ack()
      await none(bus, queue, 1_300)
      await letters.nothing()
    })
  })

  suite.group('fencing', () => {
    const settlements: Record<string, (job: ClaimedJob<Tx>) => Promise<void>> = {
      ack: (job) => job.ack(),
      nak: (job) => job.nak(),
      'nak with a delay': (job) => job.nak(0),
      deadLetter: (job) => job.deadLetter('stale'),
      heartbeat: (job) => job.heartbeat(),
      'lease.heartbeat': (job) => job.lease.heartbeat(),
    }
    for (const [name, settle] of Object.entries(settlements)) {
      suite.where(
        'strictJobFencing',
        `J6 once the job was claimed again, ${name} of the older claim is refused and changes nothing`,
        async (stage) => {
          const [bus, other] = [await stage.open(), await stage.open()]
          const queue = unique('q')
          const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
          await bus.jobs.enqueue(queue, { payload: 'x' })
          const stale = await claimed(bus, queue, { ttlMs: SHORT_TTL_MS })
          const fresh = await claimed(other, queue)
          for (let tries = 0; tries < 2; tries++) await rejects(settle(stale), 'lease_lost')
          await none(bus, queue)
          await fresh.heartbeat()
          await fresh.ack()
          await rejects(settle(stale), 'lease_lost')
          await Promise.all([none(bus, queue), letters.nothing()])
        },
      )
    }

    suite.where('strictJobFencing', 'J6 releasing the lease of an older claim leaves the newer one alone', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const stale = await claimed(bus, queue, { ttlMs: SHORT_TTL_MS })
      const fresh = await claimed(bus, queue)
      await stale.lease.release()
      await none(bus, queue)
      await fresh.ack()
    })

    suite.where('strictJobFencing', 'J6 once the job is dead, the older claims are refused', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const stale = await claimed(bus, queue, { ttlMs: SHORT_TTL_MS })
      await (await claimed(bus, queue)).deadLetter('r')
      for (const settle of Object.values(settlements)) await rejects(settle(stale), 'lease_lost')
      await letters.next()
      await letters.nothing()
    })

    suite.where('strictJobFencing', 'J6 once the last lease has run out and the job is dead, its last claim is refused', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts: 1 })
      const last = await claimed(bus, queue, { ttlMs: SHORT_TTL_MS })
      await none(bus, queue, SHORT_TTL_MS + 300)
      await letters.next()
      for (const settle of Object.values(settlements)) await rejects(settle(last), 'lease_lost')
    })

    suite.where('strictJobFencing', 'J6 expired but not claimed again: the ack succeeds, and the job never comes again', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const job = await claimed(bus, queue, { ttlMs: SHORT_TTL_MS })
      await pause(SHORT_TTL_MS + 150)
      await job.ack()
      await none(bus, queue)
    })

    suite.where('strictJobFencing', 'J6 expired but not claimed again: nak and deadLetter succeed as well', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      await bus.jobs.enqueueMany(queue, [{ payload: 'naked' }, { payload: 'dead' }])
      const [naked, dead] = await bus.jobs.claimMany(queue, 'w', SHORT_TTL_MS, { limit: 2 })
      await pause(SHORT_TTL_MS + 150)
      await naked!.nak(1_000)
      await dead!.deadLetter('r')
      await none(bus, queue)
      assert.equal(text((await letters.next()).payload), text(dead!.payload))
      assert.deepEqual(text((await claimed(bus, queue)).payload), text(naked!.payload))
    })

    suite.where('strictJobFencing', 'J6 of an ack and a new claim that race one wins', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      await bus.jobs.enqueueMany(
        queue,
        Array.from({ length: 30 }, (_, index) => ({ payload: `${index}` })),
      )
      const held = await bus.jobs.claimMany(queue, 'w', 600, { limit: 30 })
      await pause(500)
      const again = new Set<string>()
      const claiming = (async () => {
        for (const end = performance.now() + 600; performance.now() < end; ) {
          const job = await other.jobs.claim(queue, 'w2', LONG_TTL_MS, { waitMs: 50 })
          if (job) again.add(job.id)
        }
      })()
      const acked = new Set<string>()
      for (const job of held) {
        if (await succeeds(job.ack(), 'lease_lost')) acked.add(job.id)
        await pause(8)
      }
      await claiming
      for (let job = await other.jobs.claim(queue, 'w3', LONG_TTL_MS); job; job = await other.jobs.claim(queue, 'w3', LONG_TTL_MS))
        again.add(job.id)
      for (const { id } of held) assert.ok(acked.has(id) !== again.has(id), `acked ${acked.has(id)}, again ${again.has(id)}`)
    })

    for (const [first, second] of [
      ['ack', 'ack'],
      ['ack', 'nak'],
      ['ack', 'deadLetter'],
      ['nak', 'ack'],
      ['nak', 'nak'],
      ['deadLetter', 'ack'],
      ['deadLetter', 'nak'],
    ] as const) {
      suite.test(`J6 ${second} after ${first} is already_settled, and the ${first} stands`, async (stage) => {
        const bus = await stage.open()
        const queue = unique('q')
        const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
        await bus.jobs.enqueue(queue, { payload: 'x' })
        const job = await claimed(bus, queue)
        await settlements[first]!(job)
        for (let tries = 0; tries < 2; tries++) await rejects(settlements[second]!(job), 'already_settled')
        if (first === 'nak') assert.equal((await claimed(bus, queue)).attempt, 2)
        else await none(bus, queue)
        if (first === 'deadLetter') await letters.next()
        await letters.nothing()
      })
    }

    suite.test('J6 of settlements at the same moment the first stands', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const job = await claimed(bus, queue)
      const [ack, nak, dead] = [job.ack(), job.nak(0), job.deadLetter('r')]
      await Promise.all([ack, rejects(nak, 'already_settled'), rejects(dead, 'already_settled')])
      await none(bus, queue)
    })

    suite.test('J6 a bad argument settles nothing', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const job = await claimed(bus, queue)
      for (const delay of [-1, 0.5, Number.NaN, Number.POSITIVE_INFINITY, 2_147_483_648])
        await rejects(job.nak(delay), 'invalid_argument', 'delayMs')
      await rejects(job.deadLetter(undefined as unknown as string), 'invalid_argument', 'reason')
      await job.ack()
    })

    suite.test('J6 heartbeats keep the job for as long as they come, and extend its lease', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const job = await claimed(bus, queue, { ttlMs: 2_500 })
      let expiresAt = job.lease.expiresAt.getTime()
      for (let beat = 0; beat < 5; beat++) {
        await none(other, queue, 600)
        await (beat % 2 ? job.heartbeat() : job.lease.heartbeat())
        assert.ok(job.lease.expiresAt.getTime() >= expiresAt, 'never shortened')
        expiresAt = job.lease.expiresAt.getTime()
      }
      assert.equal(job.lease.signal.aborted, false)
      await job.ack()
    })

    suite.test('J6 the signal of the lease is aborted when it has run out, and not when the job was settled', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueueMany(queue, [{ payload: 'a' }, { payload: 'b' }])
      const [lost, done] = [await claimed(bus, queue, { ttlMs: 1_000 }), await claimed(bus, queue, { ttlMs: 1_000 })]
      await done.ack()
      const aborted = Promise.withResolvers<void>()
      lost.lease.signal.addEventListener('abort', () => aborted.resolve())
      await within(aborted.promise, 4_000, 'the abort')
      await pause(100)
      assert.equal(done.lease.signal.aborted, false)
    })

    suite.test('J6 releasing the lease gives the job to the next at once', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const id = await bus.jobs.enqueue(queue, { payload: 'x' })
      const job = await claimed(bus, queue)
      await job.lease.release()
      await job.lease.release()
      const next = await eventually(() => bus.jobs.claim(queue, 'w', LONG_TTL_MS), 'the next claim', 2_000)
      assert.equal(next.id, id)
    })
  })
}

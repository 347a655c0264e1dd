/** Administration: A1 to A6. */

import assert from 'node:assert/strict'
import type { JobInfo, QueueInfo } from '../../core/admin.ts'
import type { Bus } from '../../core/types.ts'
import { eventually, rejects, type Suite, sameBytes, sorted, text, unique, within } from './kit.ts'
import { refuses } from './refusals.ts'

const LONG_TTL_MS = 60_000

async function queueOf<Tx>(bus: Bus<Tx>, queue: string): Promise<QueueInfo | undefined> {
  return (await bus.admin.queues()).find((info) => info.queue === queue)
}

async function listed(jobs: AsyncIterable<JobInfo>): Promise<JobInfo[]> {
  const all: JobInfo[] = []
  for await (const job of jobs) all.push(job)
  return all
}

/** One job in each state; the running one is held by the answer. */
async function inEachState<Tx>(bus: Bus<Tx>, queue: string) {
  const dead = await bus.jobs.enqueue(queue, { payload: 'dead', dedupKey: 'k', headers: { h: 'v' } })
  await (await bus.jobs.claim(queue, 'undertaker', LONG_TTL_MS))!.deadLetter('of old age')
  const running = await bus.jobs.enqueue(queue, { payload: 'running' })
  const claim = await bus.jobs.claim(queue, 'holder', LONG_TTL_MS)
  assert.equal(claim?.id, running)
  const ready = await bus.jobs.enqueue(queue, { payload: 'ready', ...(bus.supports.priorities ? { priority: 3 } : {}) })
  const scheduled = await bus.jobs.enqueue(queue, { payload: 'later', delayMs: LONG_TTL_MS, maxAttempts: 9 })
  return { dead, running, ready, scheduled, claim: claim! }
}

export function adminTests<Tx>(suite: Suite<Tx>): void {
  suite.group('looking', () => {
    suite.test('A1 a queue is counted by the states of its jobs', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      assert.equal(await queueOf(bus, queue), undefined)
      await inEachState(bus, queue)
      const info = await queueOf(bus, queue)
      assert.ok(info?.oldestReadyAt && Math.abs(info.oldestReadyAt.getTime() - Date.now()) < LONG_TTL_MS)
      assert.deepEqual(
        { ...info, oldestReadyAt: undefined },
        { queue, ready: 1, scheduled: 1, running: 1, dead: 1, oldestReadyAt: undefined },
      )
      const names = (await bus.admin.queues()).map((one) => one.queue)
      assert.deepEqual(names, sorted(names))
    })

    suite.test('A1 jobs are listed in the order of their ids, by queue, by state and from an id on', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const jobs = await inEachState(bus, queue)
      const all = [jobs.dead, jobs.running, jobs.ready, jobs.scheduled]
      assert.deepEqual(
        (await listed(bus.admin.jobs({ queue }))).map(({ id }) => id),
        all,
      )
      assert.deepEqual(
        (await listed(bus.admin.jobs({ queue, after: jobs.running }))).map(({ id }) => id),
        all.slice(2),
      )
      for (const state of ['dead', 'running', 'ready', 'scheduled'] as const) {
        assert.deepEqual(
          (await listed(bus.admin.jobs({ queue, state }))).map((job) => [job.id, job.state]),
          [[jobs[state], state]],
        )
      }
      const everywhere = await listed(bus.admin.jobs({ state: 'dead' }))
      assert.ok(everywhere.some(({ id }) => id === jobs.dead))
      assert.deepEqual(await listed(bus.admin.jobs({ queue: unique('q') })), [])
    })

    suite.test('A1 more jobs than fit in a page are listed once each', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const ids = await bus.jobs.enqueueMany(
        queue,
        Array.from({ length: 1_203 }, (_, n) => ({ payload: `${n}` })),
      )
      assert.deepEqual(
        (await listed(bus.admin.jobs({ queue }))).map(({ id }) => id),
        ids,
      )
    })

    suite.test('A1 a job is shown with what it carries', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const jobs = await inEachState(bus, queue)
      const dead = await bus.admin.job(jobs.dead)
      assert.ok(dead?.diedAt)
      sameBytes(dead.payload, 'dead')
      assert.deepEqual(
        [dead.queue, dead.state, dead.attempts, dead.maxAttempts, dead.dedupKey, dead.lastError, dead.headers.h, dead.payloadBytes],
        [queue, 'dead', 1, 5, 'k', 'of old age', 'v', 4],
      )
      const running = await bus.admin.job(jobs.running)
      // Two clocks are read for it, one after the other.
      assert.ok(running?.leasedUntil && Math.abs(running.leasedUntil.getTime() - jobs.claim.lease.expiresAt.getTime()) <= 1_000)
      if (running.workerId !== undefined) assert.equal(running.workerId, 'holder')
      const scheduled = await bus.admin.job(jobs.scheduled)
      assert.equal(scheduled?.maxAttempts, 9)
      assert.ok(scheduled.runAt.getTime() - scheduled.enqueuedAt.getTime() > LONG_TTL_MS / 2)
      assert.equal((await bus.admin.job(jobs.ready))?.priority, bus.supports.priorities ? 3 : 0)
      await jobs.claim.ack()
      assert.equal(await bus.admin.job(jobs.running), null)
      assert.equal(await bus.admin.job('no-such-job'), null)
    })

    suite.test('A1 a job whose lease is over and that nobody has claimed since is ready, and shows when the lease ended', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const id = await bus.jobs.enqueue(queue, { payload: 'x' })
      const claim = await bus.jobs.claim(queue, 'w', 50)
      const info = await eventually(async () => {
        const seen = await bus.admin.job(id)
        return seen?.state === 'ready' && seen
      }, 'the end of the lease')
      assert.ok(info.leasedUntil && Math.abs(info.leasedUntil.getTime() - claim!.lease.expiresAt.getTime()) <= 1_000)
      await claim!.nak(0)
      assert.equal((await bus.admin.job(id))?.leasedUntil, undefined)
    })

    suite.where('redeliveryCounts', 'A1 a durable is counted by what becomes of its messages', async (stage) => {
      const bus = await stage.open()
      const [subject, durable] = [unique('p'), unique('d')]
      const { next } = await stage.subscribe(bus, subject, durable, { maxAckPending: 2 })
      for (const payload of ['1', '2', '3']) await bus.pubsub.publish(subject, payload)
      await bus.pubsub.publish(unique('other'), 'x')
      await next()
      const second = await next()
      const infoOf = async () => (await bus.admin.durables()).find((one) => one.durable === durable)
      const info = await eventually(async () => {
        const seen = await infoOf()
        return seen?.inFlight === 2 && seen
      }, 'two in flight')
      assert.deepEqual([info.filter, info.pending, info.inFlight, info.redelivering], [subject, 1, 2, 0])
      assert.ok(Math.abs(info.lastActiveAt.getTime() - Date.now()) < 40_000)
      await second.nak(LONG_TTL_MS)
      const after = await infoOf()
      assert.deepEqual([after?.pending, after?.inFlight, after?.redelivering], [1, 1, 1])
    })

    suite.test('A1 buckets are counted by their present keys', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const infoOf = async () => (await bus.admin.buckets()).find((one) => one.bucket === bucket)
      assert.equal(await infoOf(), undefined)
      await bus.kv.put(bucket, 'a', 'xy')
      await bus.kv.put(bucket, 'b', 'xyz')
      await bus.kv.put(bucket, 'c', 'gone')
      await bus.kv.delete(bucket, 'c')
      assert.deepEqual(await infoOf(), { bucket, keys: 2, bytes: 5 })
      await bus.kv.delete(bucket, 'a')
      await bus.kv.delete(bucket, 'b')
      assert.equal(await infoOf(), undefined)
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x', dedupKey: 'k' })
      assert.equal((await bus.admin.buckets()).find((one) => one.bucket === `dedup.${queue}`)?.keys, 1)
    })
  })

  suite.group('jobs of an operator', () => {
    suite.test('A2 a dead job is retried with all its attempts, a scheduled one runs now', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const jobs = await inEachState(bus, queue)
      await bus.admin.retryJob(jobs.dead)
      await bus.admin.retryJob(jobs.scheduled)
      await bus.admin.retryJob(jobs.ready)
      const claimed = await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 10 })
      assert.deepEqual(
        claimed.map(({ payload }) => text(payload)),
        ['ready', 'dead', 'later'],
      )
      assert.deepEqual(
        claimed.map(({ attempt }) => attempt),
        [1, 1, 1],
      )
      await rejects(bus.admin.retryJob(jobs.running), 'conflict', /running/)
      await rejects(bus.admin.retryJob('no-such-job'), 'not_found')
      await jobs.claim.ack()
      await rejects(bus.admin.retryJob(jobs.running), 'not_found')
    })

    suite.test('A2 a job whose last lease ran out is dead, and retried with all its attempts', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const id = await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts: 1 })
      await bus.jobs.claim(queue, 'w', 1)
      await eventually(async () => (await bus.admin.job(id))?.state !== 'running', 'the end of the lease')
      await bus.admin.retryJob(id)
      const job = await bus.jobs.claim(queue, 'w', LONG_TTL_MS)
      assert.deepEqual([job?.id, job?.attempt], [id, 1])
      await job?.ack()
    })

    suite.test('A1 a dead job became due when it did, whatever its last nak said', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const id = await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts: 1 })
      const due = (await bus.admin.job(id))?.runAt.getTime() ?? Number.NaN
      await (await bus.jobs.claim(queue, 'w', LONG_TTL_MS))?.nak(LONG_TTL_MS)
      const job = await bus.admin.job(id)
      assert.equal(job?.state, 'dead')
      assert.ok(Math.abs(job.runAt.getTime() - due) < LONG_TTL_MS / 2)
    })

    suite.test('A6 an id is taken as it is: with a zero before it it names no job', async (stage) => {
      const bus = await stage.open()
      const id = await bus.jobs.enqueue(unique('q'), { payload: 'x' })
      assert.equal(await bus.admin.job(`0${id}`), null)
      for (const call of [bus.admin.retryJob(`0${id}`), bus.admin.cancelJob(`0${id}`), bus.admin.removeJob(`0${id}`)]) {
        await rejects(call, 'not_found')
      }
      assert.equal((await bus.admin.job(id))?.state, 'ready')
    })

    suite.test('J4 of a long reason the first 4,000 characters are kept', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      const id = await bus.jobs.enqueue(queue, { payload: 'x' })
      await bus.admin.cancelJob(id, '😀'.repeat(4_001))
      assert.equal((await bus.admin.job(id))?.lastError, '😀'.repeat(4_000))
      assert.equal((await letters.next()).headers.dlq_reason, '😀'.repeat(4_000))
    })

    suite.test('A2 retrying wakes who waits for a job', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      const id = await bus.jobs.enqueue(queue, { payload: 'x', delayMs: LONG_TTL_MS })
      const claiming = other.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 20_000 })
      await bus.admin.retryJob(id)
      assert.equal((await within(claiming, 4_000, 'the job'))?.id, id)
    })

    suite.test('A2 all dead jobs of a queue are retried, and of no other', async (stage) => {
      const bus = await stage.open()
      const queues = [unique('q'), unique('q')] as const
      for (const queue of queues) {
        await bus.jobs.enqueueMany(queue, [{ payload: 'x' }, { payload: 'x' }])
        for (const job of await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 2 })) await job.deadLetter('r')
      }
      assert.equal(await bus.admin.retryDead(queues[0]), 2)
      assert.equal(await bus.admin.retryDead(queues[0]), 0)
      assert.equal((await bus.jobs.claimMany(queues[0], 'w', LONG_TTL_MS, { limit: 9 })).length, 2)
      assert.equal((await queueOf(bus, queues[1]))?.dead, 2)
    })

    suite.test('A2 a cancelled job is dead, and its holder can neither settle nor extend it', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      const jobs = await inEachState(bus, queue)
      assert.equal((await letters.next()).headers.dlq_job_id, jobs.dead)
      for (const id of [jobs.running, jobs.ready, jobs.scheduled]) {
        await bus.admin.cancelJob(id, 'not wanted\nany more')
        const letter = await letters.next()
        assert.deepEqual([letter.headers.dlq_job_id, letter.headers.dlq_reason], [id, 'not wanted any more'])
        assert.equal((await bus.admin.job(id))?.state, 'dead')
      }
      await rejects(jobs.claim.heartbeat(), 'lease_lost')
      await rejects(jobs.claim.ack(), 'lease_lost')
      // Once is enough: no second letter.
      await bus.admin.cancelJob(jobs.ready)
      await bus.admin.cancelJob(jobs.dead)
      await letters.nothing()
      assert.equal((await bus.admin.job(jobs.dead))?.lastError, 'of old age')
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS), null)
      await bus.admin.retryJob(jobs.running)
      assert.equal((await bus.jobs.claim(queue, 'w', LONG_TTL_MS))?.id, jobs.running)
      await rejects(bus.admin.cancelJob('no-such-job'), 'not_found')
    })

    suite.test('A2 a job is removed without a letter, unless it is running', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const letters = await stage.subscribe(bus, `${queue}.dlq`, unique('d'))
      const jobs = await inEachState(bus, queue)
      await letters.next()
      await rejects(bus.admin.removeJob(jobs.running), 'conflict', /running/)
      for (const id of [jobs.dead, jobs.ready, jobs.scheduled]) await bus.admin.removeJob(id)
      assert.deepEqual(
        (await listed(bus.admin.jobs({ queue }))).map(({ id }) => id),
        [jobs.running],
      )
      await letters.nothing()
      await rejects(bus.admin.removeJob(jobs.dead), 'not_found')
      await jobs.claim.ack()
    })

    suite.test('A2 a queue is purged of what is not running, all or by state', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const { claim, dead, ready } = await inEachState(bus, queue)
      assert.equal(await bus.admin.purgeQueue(queue, { states: ['scheduled'] }), 1)
      assert.deepEqual(
        (await listed(bus.admin.jobs({ queue }))).map(({ id }) => id),
        [dead, claim.id, ready],
      )
      assert.equal(await bus.admin.purgeQueue(queue), 2)
      assert.equal(await bus.admin.purgeQueue(queue, { states: [] }), 0)
      await claim.nak(0)
      assert.equal(await bus.admin.purgeQueue(queue), 1)
      assert.equal(await queueOf(bus, queue), undefined)
    })
  })

  suite.group('paused queues', () => {
    suite.test('A3 a paused queue gives no job, on any handle, and goes on when it is resumed', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'before' })
      const held = await bus.jobs.claim(queue, 'w', LONG_TTL_MS)
      await bus.admin.pauseQueue(queue)
      await bus.admin.pauseQueue(queue)
      await bus.jobs.enqueue(queue, { payload: 'meanwhile' })
      assert.ok((await queueOf(other, queue))?.pausedAt)
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS), null)
      assert.equal(await other.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 300 }), null)
      // What runs goes on.
      await held!.heartbeat()
      await held!.ack()
      const claiming = other.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 20_000 })
      await bus.admin.resumeQueue(queue)
      assert.equal(text((await within(claiming, 4_000, 'the job'))!.payload), 'meanwhile')
      assert.equal((await queueOf(bus, queue))?.pausedAt, undefined)
      await bus.admin.resumeQueue(queue)
    })

    suite.test('A3 a queue without jobs can be paused, and shows; others are not', async (stage) => {
      const bus = await stage.open()
      const [queue, beside] = [unique('q'), unique('q')]
      await bus.admin.pauseQueue(queue)
      assert.equal((await queueOf(bus, queue))?.ready, 0)
      await bus.jobs.enqueue(beside, { payload: 'x' })
      assert.ok(await bus.jobs.claim(beside, 'w', LONG_TTL_MS))
      await bus.admin.resumeQueue(queue)
      assert.equal(await queueOf(bus, queue), undefined)
    })
  })

  suite.group('moved durables', () => {
    suite.test('A4 a durable begins again where it is told to, and its members with it', async (stage) => {
      const bus = await stage.open()
      const [subject, durable] = [unique('p'), unique('d')]
      const seqs: number[] = []
      for (const payload of ['1', '2', '3']) seqs.push((await bus.pubsub.publish(subject, payload)).seq)
      const member = await stage.subscribe(bus, subject, durable)
      for (const payload of ['1', '2', '3']) {
        const message = await member.next()
        assert.equal(text(message.payload), payload)
        await message.ack()
      }
      const read = async (...payloads: string[]) => {
        for (const payload of payloads) {
          const message = await member.next()
          assert.deepEqual([text(message.payload), message.attempt], [payload, 1])
          await message.ack()
        }
        await member.nothing()
      }
      await bus.admin.seekDurable(durable, 'all')
      await read('1', '2', '3')
      await bus.admin.seekDurable(durable, { seq: seqs[1] as number })
      await read('2', '3')
      await bus.pubsub.publish(subject, '4')
      await read('4')
      await bus.admin.seekDurable(durable, { time: new Date(Date.now() + LONG_TTL_MS) })
      await bus.pubsub.publish(subject, 'too early')
      await member.nothing()
      await bus.admin.seekDurable(durable, 'new')
      await bus.pubsub.publish(subject, '5')
      await read('5')
      await rejects(bus.admin.seekDurable(unique('d'), 'all'), 'not_found')
    })

    suite.where(
      'strictFencing',
      'A4 what was handed out before the move cannot be settled, and comes again where it is wanted',
      async (stage) => {
        const bus = await stage.open()
        const [subject, durable] = [unique('p'), unique('d')]
        await bus.pubsub.publish(subject, 'x')
        const member = await stage.subscribe(bus, subject, durable)
        const before = await member.next()
        await bus.admin.seekDurable(durable, 'all')
        const again = await member.next()
        assert.deepEqual([again.seq, again.attempt], [before.seq, 1])
        await rejects(before.ack(), 'lease_lost')
        await rejects(before.extend(), 'lease_lost')
        await again.ack()
        await member.nothing()
      },
    )

    suite.test('A4 members of a durable that was deleted do not go on with one that was made anew', async (stage) => {
      const bus = await stage.open()
      const [subject, durable] = [unique('p'), unique('d')]
      const old = await stage.subscribe(bus, subject, durable)
      await bus.pubsub.deleteDurable(durable)
      const fresh = await stage.subscribe(bus, subject, durable)
      await rejects(old.reader.ask(), 'not_found')
      await bus.pubsub.publish(subject, 'x')
      assert.equal(text((await fresh.next()).payload), 'x')
    })
  })

  suite.group('purged messages', () => {
    suite.test('A5 what matches is gone for every durable, new ones too; the rest stays', async (stage) => {
      const bus = await stage.open()
      const root = unique('p')
      const [first, second] = [unique('d'), unique('d')]
      const early = await stage.subscribe(bus, `${root}.>`, first, { maxInFlight: 1 })
      for (const subject of ['a.x', 'a.y', 'b.x']) await bus.pubsub.publish(`${root}.${subject}`, subject)
      const held = await early.next()
      assert.equal(text(held.payload), 'a.x')
      assert.equal(await bus.admin.purgeMessages(`${root}.a.*`), 2)
      assert.equal(await bus.admin.purgeMessages(`${root}.a.*`), 0)
      // One that is out may be settled.
      await held.ack()
      const late = await stage.subscribe(bus, `${root}.>`, second)
      for (const { next, nothing } of [early, late]) {
        const message = await next()
        assert.equal(text(message.payload), 'b.x')
        await message.ack()
        await nothing()
      }
    })

    suite.test('A5 a message that was put back is not delivered again once it is purged', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const member = await stage.subscribe(bus, subject, unique('d'), { maxDeliver: 2 })
      await bus.pubsub.publish(subject, 'purged')
      await (await member.next()).nak(300)
      assert.equal(await bus.admin.purgeMessages(subject), 1)
      await bus.pubsub.publish(subject, 'after')
      const message = await member.next()
      assert.equal(text(message.payload), 'after')
      await message.ack()
      await member.nothing(600)
    })

    suite.test('A5 only what was published before a time goes, if one is given', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      await bus.pubsub.publish(subject, 'x')
      assert.equal(await bus.admin.purgeMessages(subject, { before: new Date(Date.now() - LONG_TTL_MS) }), 0)
      assert.equal(await bus.admin.purgeMessages(subject, { before: new Date(Date.now() + LONG_TTL_MS) }), 1)
    })
  })

  suite.group('what an operator mistypes', () => {
    suite.test('A6 arguments are checked, and nothing is changed', async (stage) => {
      const bus = await stage.open()
      const { admin } = bus
      const queue = unique('q')
      const id = await bus.jobs.enqueue(queue, { payload: 'x' })
      const names = ['', 'a b', '.a', 'a..b', '*', 7, null, undefined]
      for (const call of [admin.retryDead, admin.purgeQueue, admin.pauseQueue, admin.resumeQueue] as ((
        queue: string,
      ) => Promise<unknown>)[]) {
        await refuses('queue', names, (name) => call.call(admin, name))
      }
      const ids = ['', 'a\0b', 7, null, undefined, {}, 'x'.repeat(513)]
      for (const call of [admin.job, admin.retryJob, admin.cancelJob, admin.removeJob] as ((id: string) => Promise<unknown>)[]) {
        await refuses('id', ids, (value) => call.call(admin, value))
      }
      await refuses('reason', [7, null, 'a\0b', '\ud800'], (reason) => admin.cancelJob(id, reason))
      await refuses('queue', ['', 'a b', 7, null], (value) => listed(admin.jobs({ queue: value })))
      await refuses('state', ['', 'done', 7, null], (value) => listed(admin.jobs({ state: value })))
      await refuses('after', ['', 'x', '-1', 7, null], (value) => listed(admin.jobs({ after: value })))
      await refuses('states', ['ready', ['running'], [7], null, {}], (states) => admin.purgeQueue(queue, { states }))
      await refuses('durable', ['', 'a.b', 7, null], (value) => admin.seekDurable(value, 'all'))
      await refuses(/start/, ['', 'old', {}, { seq: -1 }, { time: 'x' }, null, 7], (start) => admin.seekDurable(unique('d'), start))
      await refuses('filter', ['', 'a..b', 'a.>.b', '$x', 'a b', 7, null], (filter) => admin.purgeMessages(filter))
      await refuses('before', ['x', 7, null, new Date(Number.NaN)], (before) => admin.purgeMessages(unique('p'), { before }))
      assert.equal((await bus.admin.job(id))?.state, 'ready')
      await bus.admin.removeJob(id)
    })
  })
}

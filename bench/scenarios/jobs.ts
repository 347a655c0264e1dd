/** Enqueue, drain, latency, claim and ack. */

import { performance } from 'node:perf_hooks'
import { setTimeout as pause } from 'node:timers/promises'
import { PostgresBus } from '../../dist/index.js'
import { BareJobs } from '../contenders/bare.ts'
import type { JobsSession } from '../contenders.ts'
import { latencies, type Metric, rate, Stopwatch, timed } from '../measure.ts'
import { type ComparedScenario, type OwnScenario, payload, payloads } from '../scenario.ts'

const CURVE = [4, 16, 64, 256]
const BULK = 1_000
const DRAINED = 100_000

export async function fill(session: Pick<JobsSession, 'enqueueMany'>, count: number): Promise<void> {
  const batch = payloads(BULK)
  // Two at once, so that a client that waits does not leave the server idle.
  let left = count
  await Promise.all(
    [1, 2].map(async () => {
      while (left > 0) {
        const size = Math.min(BULK, left)
        left -= size
        await session.enqueueMany(size === BULK ? batch : batch.slice(0, size))
      }
    }),
  )
}

export const enqueue: ComparedScenario<'jobs'> = {
  name: 'enqueue',
  title: 'enqueue, each call resolved when the job is durable',
  kind: 'jobs',
  withinS: 90,
  async measure(session, { quick, serverPid }) {
    const ms = quick ? 700 : 2_000
    const warmUpMs = quick ? 300 : 500
    const one = (_: number, turn: number) => session.enqueue(payload(turn))
    const metrics: Metric[] = []
    for (const callers of [1, 32]) {
      const plot = { plot: 'enqueue', x: callers }
      metrics.push(await rate(`${callers} caller${callers === 1 ? '' : 's'}`, 'jobs/s', { callers, ms, warmUpMs, serverPid, plot }, one))
    }
    const batch = payloads(BULK)
    const many = { callers: 1, ms, warmUpMs, weight: BULK, serverPid }
    metrics.push(await rate(`enqueueMany, ${BULK} a call`, 'jobs/s', many, () => session.enqueueMany(batch)))
    for (const callers of CURVE) {
      const plot = { plot: 'enqueue', x: callers }
      const short = { callers, ms: quick ? 150 : 500, warmUpMs: quick ? 50 : 150, serverPid, plot }
      metrics.push(await rate(`${callers} callers`, 'jobs/s', short, one))
    }
    return metrics
  },
}

export const drain: ComparedScenario<'jobs'> = {
  name: 'drain',
  title: 'drain of stored jobs by a handler that does nothing, one process',
  kind: 'jobs',
  withinS: 180,
  async measure(session, { quick, serverPid }, contender) {
    const count = Math.min(contender.drains ?? DRAINED, quick ? 30_000 : DRAINED)
    await session.reset()
    await fill(session, count / 10)
    await session.drain(count / 10)
    await session.reset()
    await fill(session, count)
    return [await timed('drain', 'jobs/s', count, serverPid, () => session.drain(count))]
  },
}

export const latency: ComparedScenario<'jobs'> = {
  name: 'latency',
  title: 'from enqueue to the start of the handler',
  kind: 'jobs',
  withinS: 90,
  async measure(session, { quick, serverPid }) {
    const sent = new Map<string, number>()
    const seen: number[] = []
    let next = 0
    let arrived: (() => void) | undefined
    const worker = await session.work((bytes) => {
      const at = sent.get(bytes.toString('latin1', 0, 16))
      if (at === undefined) return
      sent.delete(bytes.toString('latin1', 0, 16))
      seen.push(performance.now() - at)
      arrived?.()
    })
    const send = async () => {
      const id = `job-${next++}`.padEnd(16)
      const bytes = payload(0)
      bytes.write(id, 0, 'latin1')
      sent.set(id, performance.now())
      await session.enqueue(bytes)
    }
    /** Resolves when `count` have been seen; rejects when nothing comes any more. */
    const until = async (count: number) => {
      while (seen.length < count) {
        const soon = new Promise<void>((resolve) => {
          arrived = resolve
        })
        const late = await Promise.race([soon, pause(20_000, true)])
        if (late) throw new Error(`only ${seen.length} of ${count} jobs were handled`)
      }
    }
    const idle = async (samples: number) => {
      for (let n = 0; n < samples; n++) {
        const count = seen.length + 1
        await send()
        await until(count)
        // Long enough that the worker is waiting again; uneven, so that no poll falls into step.
        await pause(10 + (n % 11))
      }
    }
    await idle(20)
    seen.length = 0
    let watch = new Stopwatch(serverPid)
    await idle(quick ? 120 : 200)
    const metrics = latencies('idle', seen, watch.stop().cpu, 'latency-idle')

    const steady = async (seconds: number) => {
      const began = performance.now()
      const sends: Promise<void>[] = []
      const total = seconds * 500
      while (sends.length < total) {
        const due = Math.min(total, Math.floor((performance.now() - began) / 2) + 1)
        while (sends.length < due) sends.push(send())
        await pause(1)
      }
      await Promise.all(sends)
      await until(total)
    }
    seen.length = 0
    await steady(1)
    seen.length = 0
    watch = new Stopwatch(serverPid)
    await steady(quick ? 2 : 5)
    metrics.push(...latencies('500 jobs/s', seen, watch.stop().cpu, 'latency-500'))
    await worker[Symbol.asyncDispose]()
    return metrics
  },
}

export const claimAck: OwnScenario = {
  name: 'claim-ack',
  title: 'claim and ack one by one, one caller',
  kind: 'own',
  withinS: 60,
  contenders: {
    async 'klieo-bus'({ servers, quick, serverPid }) {
      await using bus = await PostgresBus.connect({ connectionString: servers.postgresUrl })
      const jobs = {
        enqueueMany: (batch: readonly Buffer[]) =>
          bus.jobs.enqueueMany(
            'one',
            batch.map((bytes) => ({ payload: bytes })),
          ),
      }
      await fill(jobs, quick ? 5_000 : 10_000)
      const times = { callers: 1, ms: quick ? 1_000 : 2_500, warmUpMs: 500, serverPid }
      return [
        await rate('claim + ack', 'jobs/s', times, async () => {
          const job = await bus.jobs.claim('one', 'bench', 30_000)
          if (!job) throw new Error('the queue is empty')
          await job.ack()
        }),
      ]
    },
    async 'bare statements'({ servers, quick, serverPid }) {
      await using jobs = await BareJobs.open(servers.postgresUrl)
      await fill(jobs, quick ? 5_000 : 10_000)
      const times = { callers: 1, ms: quick ? 1_000 : 2_500, warmUpMs: 500, serverPid }
      return [await rate('claim + ack', 'jobs/s', times, () => jobs.claimOne())]
    },
  },
}

/** The process that the soak looks at: `node bench/soak-child.ts <url> <minutes>`. Sends a sample a second. */

import { performance } from 'node:perf_hooks'
import { setTimeout as pause } from 'node:timers/promises'
import pg from 'pg'
import { PostgresBus, Worker } from '../dist/index.js'
import { type Sample, SOAK } from './soak.ts'

const url = process.argv[2]!
const seconds = Number(process.argv[3]) * 60
/**
 * A little work that takes a while: with a full window of each, the backlog outlasts ten minutes.
 */
const MESSAGE_MS = 300
const JOB_MS = 75

class Gauge {
  now = 0
  done = 0
  #most = 0

  async during(work: () => Promise<unknown>): Promise<void> {
    this.now++
    this.#most = Math.max(this.#most, this.now)
    await work()
    this.now--
    this.done++
  }

  takeMost(): number {
    const most = this.#most
    this.#most = this.now
    return most
  }
}

const bus = await PostgresBus.connect({ connectionString: url })
const observer = new pg.Client({ connectionString: url })
await observer.connect()
const messages = new Gauge()
const jobs = new Gauge()
const stream = await bus.pubsub.subscribe(SOAK.subject, SOAK.durable, { maxInFlight: SOAK.maxInFlight })
const consuming = (async () => {
  for await (const msg of stream) {
    void messages.during(async () => {
      await pause(MESSAGE_MS)
      // Closed meanwhile: the soak is over.
      await msg.ack().catch(() => {})
    })
  }
})()
const worker = new Worker(bus.jobs, SOAK.queue, () => jobs.during(() => pause(JOB_MS)), { concurrency: SOAK.concurrency })

// The tables and not the views: those would count a million rows every second.
const IN_FLIGHT = {
  name: 'in_flight',
  text: `select (select count(*)::int from klieo.deliveries where token is not null) as messages,
    (select count(*)::int from klieo.jobs where queue = $1 and attempts > 0 and token is not null) as jobs`,
  values: [SOAK.queue],
}

const began = performance.now()
for (let second = 1; second <= seconds; second++) {
  await pause(Math.max(0, began + second * 1_000 - performance.now()))
  const { rss, heapUsed } = process.memoryUsage()
  // A scan of the jobs: seldom, so that it does not become the load.
  const { rows } = second % 10 === 0 ? await observer.query<{ messages: number; jobs: number }>(IN_FLIGHT) : { rows: [] }
  const sample: Sample = {
    seconds: second,
    rssMiB: rss / 2 ** 20,
    heapMiB: heapUsed / 2 ** 20,
    messages: messages.takeMost(),
    jobs: jobs.takeMost(),
    messagesInFlight: rows[0]?.messages ?? 0,
    jobsRunning: rows[0]?.jobs ?? 0,
    messagesDone: messages.done,
    jobsDone: jobs.done,
  }
  process.send!(sample)
}
await worker.stop()
await stream.close()
await consuming
await bus.close()
await observer.end()
process.disconnect()

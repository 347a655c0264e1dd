/** Ten thousand queues. A claim on one of them must not notice the others. */

import { PostgresBus, Worker } from '../../../src/index.ts'
import { eventually } from '../../support/wait.ts'
import { type Actor, inParallel, type Load, median, quantile, range, type Scenario, timed } from '../scenario.ts'
import { buffersOf } from '../server.ts'

const JOBS = 5

interface Given {
  readonly url: string
  readonly count: number
}

const nameOf = (queue: number) => `many.q${queue}`

const actors = {
  /** A worker for each queue, until all jobs are done, and then one more. */
  workers: async ({ url, count }: Given, { say, cue }) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    let handled = 0
    let onHandled = () => {}
    const began = performance.now()
    const workers = range(count).map(
      (queue) =>
        new Worker(bus.jobs, nameOf(queue), async () => {
          handled++
          onHandled()
        }),
    )
    await eventually(() => handled === count * JOBS, { timeoutMs: 120_000, everyMs: 5 })
    say({ drained: performance.now() - began })
    for (;;) {
      await cue()
      const next = handled + 1
      const one = Promise.withResolvers<void>()
      onHandled = () => handled >= next && one.resolve()
      const asked = performance.now()
      if (handled === count * JOBS + 20) break
      await bus.jobs.enqueue(nameOf((handled * 37) % count), { payload: 'x' })
      await one.promise
      say({ woken: performance.now() - asked })
    }
    await Promise.all(workers.map((worker) => worker.stop()))
    return handled
  },
} satisfies Record<string, Actor>

async function run({ server, client, ledger, size, start }: Load): Promise<void> {
  const count = size(10_000, 500)
  const many = count.toLocaleString('en')
  await using bus = await PostgresBus.connect({ connectionString: server.url })
  await using alone = await PostgresBus.connect({ connectionString: server.url, schema: 'alone', maintenance: false })
  const within = (what: string, ms: number, seconds: number, why: string) => ledger.measure(what, ms / 1_000, 's', { atMost: seconds, why })

  const enqueued = await timed(async () => {
    for (let turn = 0; turn < JOBS; turn++)
      await Promise.all(range(count).map((queue) => bus.jobs.enqueue(nameOf(queue), { payload: `${turn}` })))
  })
  within(
    `${JOBS} jobs enqueued to each of ${many} queues, one call a job`,
    enqueued,
    5 + (count * JOBS) / 2_500,
    'calls of one tick go out together, whatever their queues',
  )
  await alone.jobs.enqueueMany(
    nameOf(0),
    range(JOBS).map((turn) => ({ payload: `${turn}` })),
  )

  const stats = await timed(async () => {
    const { rowCount } = await client.query('select * from klieo.queue_stats')
    ledger.exactly('rows of queue_stats', rowCount ?? 0, count, 'a row per queue')
  })
  ledger.measure('queue_stats', stats, 'ms', { atMost: 2_000, why: 'a page that a person waits for' })
  const upkeep = []
  for (const statement of ['klieo.reap_jobs(500)', 'klieo.prune_rest(1000000, 5000)', 'klieo.prune_kv(5000)']) {
    upkeep.push(await timed(() => client.query(`select * from ${statement}`)))
  }
  ledger.measure(
    'a round of maintenance',
    upkeep.reduce((total, ms) => total + ms),
    'ms',
    { atMost: 1_000, why: 'every ten seconds, in the background' },
  )

  // One queue of so many, and one that is alone in its schema.
  const one = async (of: PostgresBus) => {
    const ms = await timed(async () => {
      await (await of.jobs.claim(nameOf(0), 'load', 30_000))?.ack()
    })
    await of.jobs.enqueue(nameOf(0), { payload: 'x' })
    return ms
  }
  const times = { many: [] as number[], alone: [] as number[] }
  for (let turn = 0; turn < 120; turn++) {
    const both = { many: await one(bus), alone: await one(alone) }
    if (turn < 20) continue
    times.many.push(both.many)
    times.alone.push(both.alone)
  }
  ledger.measure('claim and ack on one of them, p50', median(times.many), 'ms')
  ledger.measure('… beside one that is alone', median(times.many) / median(times.alone), '×', {
    atMost: 1.5,
    why: 'it must not notice the others',
  })
  await client.query('vacuum klieo.jobs, alone.jobs')
  const buffers = async (schema: string) => {
    // The first of a session reads the catalogue, too.
    const claim = `select * from ${schema}.take_jobs('${nameOf(0)}', 'load', 1000, 1, 16777216, null)`
    for (let turn = 0; turn < 3; turn++) await buffersOf(client, claim)
    return buffersOf(client, claim)
  }
  const touched = { many: await buffers('klieo'), alone: await buffers('alone') }
  ledger.measure(`buffers of a claim; alone it touches ${touched.alone}`, touched.many, '', {
    atMost: touched.alone + 15,
    why: 'indexes that are a level or two deeper',
  })
  const first = await timed(() =>
    inParallel(range(count), 32, async (queue) => {
      const job = await bus.jobs.claim(nameOf(queue), 'load', 60_000)
      await job?.nak(0)
    }),
  )
  within(`a claim and a nak on each of ${many} queues, 32 at once`, first, 5 + count / 250, 'two statements each')

  const few = size(1_000, 100)
  await client.query(`delete from klieo.jobs`)
  for (let turn = 0; turn < JOBS; turn++)
    await Promise.all(range(few).map((queue) => bus.jobs.enqueue(nameOf(queue), { payload: `${turn}` })))
  const workers = start('workers', { count: few })
  within(
    `${few} workers of one process empty as many queues`,
    await workers.told<number>('drained'),
    60,
    'each claims, acks and looks again',
  )
  const woken: number[] = []
  for (let turn = 0; turn < 20; turn++) {
    workers.cue()
    woken.push(await workers.told<number>('woken', 30_000))
  }
  ledger.measure(`enqueue → handler among ${few} idle workers, p50`, median(woken), 'ms', {
    atMost: 250,
    why: 'it is woken, and does not wait for a poll',
  })
  ledger.measure('… the longest', Math.max(...woken), 'ms', { atMost: 2_000, why: 'two polls at the most' })
  workers.cue()
  const acted = await workers.ended<number>()
  ledger.exactly('jobs handled', acted.answer, few * JOBS + 20, 'each once')
  ledger.measure(`memory of a process with ${few} workers`, acted.peakMiB, 'MiB', { atMost: 256, why: 'a worker is a loop and a timer' })
  ledger.measure('p99 of a claim and an ack on one of them', quantile(times.many, 0.99), 'ms', {
    atMost: 250,
    why: 'a user does not see it',
  })
}

export const queues: Scenario = { name: 'queues', title: 'ten thousand queues', actors, run }

/** Consumers that stand still: a stream and a watch that nobody reads, a worker whose handlers never return. Memory stays bounded. */

import { PostgresBus, Worker } from '../../../src/index.ts'
import { eventually } from '../../support/wait.ts'
import { type Actor, beside, type Load, quantile, range, type Scenario } from '../scenario.ts'

const IDLE = { atMost: 256, why: 'what it holds does not grow with what there is' }

interface Given {
  readonly url: string
}

const actors = {
  /** Asks for one message and for no other; `unsettled` is what it was given. */
  stream: async ({ url, filter }: Given & { filter: string }, { say, cue }) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    await using stream = await bus.pubsub.subscribe(filter, `slow-${filter.split('.')[1]}`)
    const reader = stream[Symbol.asyncIterator]()
    await reader.next()
    say({ standing: true })
    await cue()
  },
  watch: async ({ url }: Given, { say, cue }) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    await using watch = await bus.kv.watch('slow')
    say({ standing: true })
    await cue()
    const changes = watch[Symbol.asyncIterator]()
    let seen = 0
    for (let change = await changes.next(); !change.done; change = await changes.next()) {
      seen++
      if (change.value.operation === 'put' && change.value.entry.key === 'last') break
    }
    return seen
  },
  /** Its handlers end when they are told. */
  worker: async ({ url }: Given, { say, cue }) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    const end = Promise.withResolvers<void>()
    const attempts: number[] = []
    const handle = async ({ attempt }: { attempt: number }) => {
      attempts.push(attempt)
      await end.promise
    }
    const worker = new Worker(bus.jobs, 'slow', handle, { concurrency: 16, leaseTtlMs: 3_000 })
    say({ standing: true })
    await cue()
    end.resolve()
    await worker.stop()
    return Math.max(...attempts)
  },
  /** Puts values of half a MiB. */
  writer: async ({ url, count }: Given & { count: number }) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    for (let from = 0; from < count; from += 10) {
      await Promise.all(range(10).map((n) => bus.kv.put('slow', `key-${(from + n) % 100}`, new Uint8Array(2 ** 19).fill(n))))
    }
    await bus.kv.put('slow', 'last', '')
  },
} satisfies Record<string, Actor>

async function run({ server, client, ledger, size, start }: Load): Promise<void> {
  await using bus = await PostgresBus.connect({ connectionString: server.url })
  const puts = size(1_000, 100)
  const large = size(200, 40)
  const small = size(20_000, 3_000)

  const watch = start('watch', {})
  await watch.told('standing')
  // One of the first kind of each, so that the streams have something to begin with.
  await bus.pubsub.publishMany([
    { subject: 'slow.large', payload: new Uint8Array(2 ** 20) },
    { subject: 'slow.small', payload: 'x' },
  ])
  const streams = [start('stream', { filter: 'slow.large' }), start('stream', { filter: 'slow.small' })]
  const worker = start('worker', {})
  for (const each of [...streams, worker]) await each.told('standing')

  const fill = async () => {
    for (let n = 0; n < large; n += 20) {
      await bus.pubsub.publishMany(range(20).map(() => ({ subject: 'slow.large', payload: new Uint8Array(2 ** 20).fill(n) })))
      await bus.jobs.enqueueMany(
        'slow',
        range(20).map(() => ({ payload: new Uint8Array(2 ** 20).fill(n) })),
      )
    }
    for (let n = 0; n < small; n += 1_000) {
      await bus.pubsub.publishMany(range(1_000).map(() => ({ subject: 'slow.small', payload: 'x'.repeat(1_000) })))
    }
    await start('writer', { count: puts }).ended()
  }
  const { latencies } = await beside(fill(), 50, () => bus.pubsub.publish('other', 'x'))
  ledger.measure('a publish beside them, p99', quantile(latencies, 0.99), 'ms', { atMost: 1_000, why: 'who stands still holds nobody up' })

  // Two leases have passed when the handlers have been asked for the third time.
  await eventually(
    async () => {
      const { rows } = await client.query<{ n: number }>(
        `select count(*)::int as n from klieo.jobs where queue = 'slow' and token is not null and visible_at > clock_timestamp()
           and visible_at > (select min(enqueued_at) from klieo.jobs) + interval '9 seconds'`,
      )
      return rows[0]?.n === 16
    },
    { timeoutMs: 30_000, what: 'the leases of 16 running jobs, renewed' },
  )
  const { rows } = await client.query<{ n: number }>(`select count(*)::int as n from klieo.jobs where token is not null`)
  ledger.exactly('jobs that a worker with 16 places holds', rows[0]?.n ?? 0, 16, 'it claims for a place')
  worker.cue()
  const worked = await worker.ended<number>()
  ledger.exactly('attempts that its jobs took, though no handler returned for two leases', worked.answer, 1, 'heartbeats go on')
  ledger.measure('memory of a process whose worker is stuck, 1 MiB a job', worked.peakMiB, 'MiB', IDLE)

  for (const [index, cast] of streams.entries()) {
    cast.cue()
    const { peakMiB } = await cast.ended()
    ledger.measure(`memory of a process whose stream nobody reads, ${index === 0 ? '1 MiB' : '1 KB'} a message`, peakMiB, 'MiB', IDLE)
  }
  const { rows: held } = await client.query<{ n: number }>('select count(*)::int as n from klieo.deliveries')
  ledger.measure('messages still held back from the other members', held[0]?.n ?? 0, '', { atMost: 2, why: 'a closing stream hands back' })

  watch.cue()
  const watched = await watch.ended<number>(120_000)
  ledger.exactly('changes that a watch nobody read for a while yields then', watched.answer, puts + 1, 'K6: none is skipped')
  ledger.measure('memory of a process whose watch nobody reads, 512 KiB a change', watched.peakMiB, 'MiB', IDLE)
}

export const slowConsumers: Scenario = {
  name: 'slow-consumers',
  title: 'consumers that stand still',
  actors,
  run,
}

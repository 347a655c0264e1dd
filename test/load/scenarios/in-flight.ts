/** Much that is not settled: messages of one durable, leased jobs, and a bucket full of keys. */

import { type Msg, PostgresBus, type PostgresTx } from '../../../src/index.ts'
import { type Actor, beside, inParallel, type Load, median, quantile, range, type Scenario, timed } from '../scenario.ts'
import { buffersOf } from '../server.ts'

interface Given {
  readonly url: string
  readonly count: number
}

const HOUR = 3_600_000

const actors = {
  /** Takes everything and settles nothing until it is told; then everything at once. */
  unsettled: async ({ url, count }: Given, { say, cue }) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    const options = { maxAckPending: count, maxInFlight: count, ackWaitMs: HOUR }
    const held: Msg<PostgresTx>[] = []
    const read = async () => {
      const stream = await bus.pubsub.subscribe('busy.>', 'busy', options)
      for await (const message of stream) {
        held.push(message)
        if (held.length % count === 0) return
      }
    }
    say({ first: await timed(read) })
    await cue()
    // By then all are due again.
    held.length = 0
    say({ again: await timed(read), attempts: Math.max(...held.map(({ attempt }) => attempt)) })
    await cue()
    const ms = await timed(() => Promise.all(held.map((message) => message.ack())))
    return { ms, count: held.length }
  },
  leased: async ({ url, count }: Given, { say, cue }) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    const claim = async () => {
      const jobs = []
      while (jobs.length < count) jobs.push(...(await bus.jobs.claimMany('busy', 'load', HOUR, { limit: 1_000 })))
      return jobs
    }
    let jobs: Awaited<ReturnType<typeof claim>> = []
    const ms = await timed(async () => {
      jobs = await claim()
    })
    say({ claimed: ms })
    await cue()
    return { ms: await timed(() => Promise.all(jobs.map((job) => job.ack()))), count: jobs.length }
  },
  keys: async ({ url }: Given) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    let count = 0
    const ms = await timed(async () => {
      for await (const _key of bus.kv.keys('busy')) count++
    })
    return { ms, count }
  },
  /** The entries, and then as many changes, which it begins to read when it is told. */
  watch: async ({ url, count }: Given, { say, cue }) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    const began = performance.now()
    await using watch = await bus.kv.watch('busy')
    const resolved = performance.now() - began
    const changes = watch[Symbol.asyncIterator]()
    for (let n = 0; n < count; n++) await changes.next()
    say({ resolved, entries: performance.now() - began })
    await cue()
    let last = 0
    const ms = await timed(async () => {
      for (let n = 0; n < count; n++) {
        const { value } = await changes.next()
        if (value?.operation === 'put') last = value.entry.revision
      }
    })
    return { ms, last }
  },
} satisfies Record<string, Actor>

type Done = { readonly ms: number; readonly count: number }

async function run({ server, client, ledger, size, start }: Load): Promise<void> {
  const count = size(100_000, 10_000)
  const many = count.toLocaleString('en')
  const within = (what: string, ms: number, seconds: number, why: string) => ledger.measure(what, ms / 1_000, 's', { atMost: seconds, why })
  const memory = { atMost: 512, why: 'some KB for each that its app holds' }
  await using bus = await PostgresBus.connect({ connectionString: server.url })
  const publish = () => bus.pubsub.publish('beside', 'x')
  const publishedWithin = (what: string, latencies: readonly number[]) =>
    ledger.measure(`a publish beside ${what}, p99`, quantile(latencies, 0.99), 'ms', { atMost: 250, why: 'publishers do not notice' })
  const take = (consumer: number) => `select * from klieo.fetch_messages(${consumer}, 1, 60000, ${10 * count}, null, 16777216)`

  // ---------------------------------------------------------------- messages
  await bus.pubsub.publishMany([])
  for (let n = 0; n < count; n += 5_000)
    await bus.pubsub.publishMany(range(5_000).map((i) => ({ subject: 'busy.one', payload: `${n + i}` })))
  const unsettled = start('unsettled', { count })
  const first = await beside(unsettled.told<number>('first'), 50, publish)
  within(`${many} messages handed out and not settled`, first.result, 60, 'two thousand a second in one process')
  publishedWithin('it', first.latencies)
  const { rows } = await client.query<{ id: number }>(`select id from klieo.consumer_offsets where durable = 'busy'`)
  const id = rows[0]?.id ?? 0
  await bus.pubsub.publishMany(range(100).map(() => ({ subject: 'busy.one', payload: 'x' })))
  const fetches: number[] = []
  for (let n = 0; n < 10; n++) {
    await client.query('begin')
    fetches.push(await timed(() => client.query(take(id))))
    await client.query('rollback')
  }
  ledger.measure(`fetching one more with ${many} in flight`, median(fetches), 'ms', {
    atMost: 250,
    why: 'it counts them for maxAckPending',
  })
  await client.query(`update klieo.deliveries set visible_at = now() - interval '1 second'`)
  await client.query(`delete from klieo.messages where payload = 'x'`)
  unsettled.cue()
  const again = await beside(unsettled.told<number>('again'), 50, publish)
  within(`${many} that became due at once, handed out again`, again.result, 60, 'as fast as new ones, about')
  publishedWithin('it', again.latencies)
  unsettled.cue()
  const acked = await unsettled.ended<Done>()
  within(`${many} acked at once`, acked.answer.ms, 30, 'gathered')
  ledger.measure('memory of the process that held them, and the same once more when they were due again', acked.peakMiB, 'MiB', {
    atMost: 1_280,
    why: '6 KB for each of twice as many handles',
  })
  const { rows: left } = await client.query<{ n: number }>('select count(*)::int as n from klieo.deliveries')
  ledger.exactly('… and left unsettled then', left[0]?.n ?? -1, 0, 'every ack counts')

  // ---------------------------------------------------------------- jobs
  for (let n = 0; n < count; n += 5_000)
    await bus.jobs.enqueueMany(
      'busy',
      range(5_000).map((i) => ({ payload: `${n + i}` })),
    )
  const leased = start('leased', { count })
  within(`${many} jobs claimed by one process`, await leased.told<number>('claimed'), 60, 'two thousand a second')
  const claims: { busy: number[]; idle: number[] } = { busy: [], idle: [] }
  for (let n = 0; n < 50; n++) {
    for (const queue of ['idle', 'busy'] as const) {
      await bus.jobs.enqueue(queue, { payload: 'x' })
      claims[queue].push(
        await timed(async () => {
          await (await bus.jobs.claim(queue, 'load', 10_000))?.ack()
        }),
      )
    }
  }
  ledger.measure(`claim and ack behind ${many} leased ones, beside one of an empty queue`, median(claims.busy) / median(claims.idle), '×', {
    atMost: 2,
    why: 'leased jobs are not looked at',
  })
  // The first looks of a session read the catalogs, too.
  const buffers = async (queue: string) => {
    let last = 0
    for (let look = 0; look < 4; look++) {
      await bus.jobs.enqueue(queue, { payload: 'x' })
      last = await buffersOf(client, `select * from klieo.take_jobs('${queue}', 'load', 3600000, 1, 16777216, null)`)
    }
    return last
  }
  const there = await buffers('idle')
  ledger.measure(`… and in buffers; there it touches ${there}`, await buffers('busy'), '', {
    atMost: there + 20,
    why: 'an index that is a level deeper',
  })
  await client.query('delete from klieo.jobs where token is null')
  leased.cue()
  const settled = await leased.ended<Done>()
  within(`${many} jobs acked at once`, settled.answer.ms, 30, 'gathered')
  ledger.measure('memory of the process that held them', settled.peakMiB, 'MiB', memory)
  const { rows: jobs } = await client.query<{ n: number }>('select count(*)::int as n from klieo.jobs')
  ledger.exactly('… and left then', jobs[0]?.n ?? -1, 0, 'every ack counts')

  // ---------------------------------------------------------------- keys
  const put = () => inParallel(range(count), 500, (n) => bus.kv.put('busy', `key-${n}`, `${n}`))
  within(`${many} keys put by one process`, await timed(put), 60, 'two thousand a second')
  const keys = await start('keys', { count }).ended<Done>()
  ledger.exactly('keys() yields', keys.answer.count, count, 'all of them')
  within('… in', keys.answer.ms, 10, 'pages of a thousand')
  ledger.measure('… memory of the process', keys.peakMiB, 'MiB', { atMost: 256, why: 'it does not hold them' })
  const gets = await Promise.all(range(100).map(async (n) => timed(() => bus.kv.get('busy', `key-${n * 7}`))))
  ledger.measure('get of one of them, p99', quantile(gets, 0.99), 'ms', { atMost: 250, why: 'one index look-up' })
  const watch = start('watch', { count })
  const resolved = await watch.told<number>('resolved', 120_000)
  within('a watch of them resolves in', resolved, 2, 'it reads a thousand before')
  within(`${many} keys put again, with the watch standing still`, await timed(put), 60, 'a watch costs the writers nothing')
  watch.cue()
  const { answer, peakMiB } = await watch.ended<{ ms: number; last: number }>()
  within(`… which then reads ${many} changes in`, answer.ms, 30, 'each page costs what it holds, not what is left')
  ledger.measure('… memory of the process', peakMiB, 'MiB', { atMost: 256, why: 'it holds a thousand or two' })
}

export const inFlight: Scenario = {
  name: 'in-flight',
  title: 'much that is not settled',
  actors,
  run,
}

/** A thousand durables on one log: publishing must not notice them, each gets everything, and one process can hold them all. */

import { setTimeout as sleep } from 'node:timers/promises'
import { PostgresBus } from '../../../src/index.ts'
import { eventually } from '../../support/wait.ts'
import { type Actor, inParallel, type Load, median, range, type Scenario, timed } from '../scenario.ts'
import { buffersOf, transactions } from '../server.ts'

interface Given {
  readonly url: string
  readonly count: number
}

const actors = {
  /** Subscribes to all of them, and tells when each has got so many more. */
  subscriber: async ({ url, count }: Given, { say, cue }) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    const seen = new Array<number>(count).fill(0)
    let total = 0
    const began = performance.now()
    const streams = await Promise.all(range(count).map((n) => bus.pubsub.subscribe('log.>', `durable-${n}`)))
    say({ subscribed: performance.now() - began })
    const readers = streams.map(async (stream, n) => {
      for await (const message of stream) {
        seen[n] = (seen[n] ?? 0) + 1
        total++
        await message.ack()
      }
    })
    for (const each of [1, 1, 1, 1, 1, 100]) {
      await cue()
      const wanted = total + each * count
      const publishedAt = performance.now()
      await bus.pubsub.publishMany(range(each).map((n) => ({ subject: `log.${n}`, payload: 'x'.repeat(100) })))
      await eventually(() => total > wanted - each * count, { timeoutMs: 60_000, everyMs: 1 })
      const firstMs = performance.now() - publishedAt
      await eventually(() => total >= wanted, { timeoutMs: 120_000, everyMs: 2 })
      say({ all: performance.now() - publishedAt, firstMs, least: Math.min(...seen), most: Math.max(...seen) })
    }
    await cue()
    await Promise.all(streams.map((stream) => stream.close()))
    await Promise.all(readers)
    return total
  },
} satisfies Record<string, Actor>

type Round = { readonly all: number; readonly firstMs: number; readonly least: number; readonly most: number }

async function run({ server, client, ledger, size, start }: Load): Promise<void> {
  const count = size(1_000, 50)
  const many = count.toLocaleString('en')
  await using bus = await PostgresBus.connect({ connectionString: server.url, maintenance: false })
  const publishes = async () => {
    const times: number[] = []
    for (let turn = 0; turn < 300; turn++) times.push(await timed(() => bus.pubsub.publish('cost.log', 'x'.repeat(100))))
    return median(times.slice(50))
  }
  const publishBuffers = async () => {
    const publish = `select klieo.publish('cost.log', 'x')`
    for (let turn = 0; turn < 3; turn++) await buffersOf(client, publish)
    return buffersOf(client, publish)
  }

  const before = { ms: await publishes(), buffers: await publishBuffers() }
  const made = await timed(() =>
    inParallel(range(count), 10, async (n) => (await bus.pubsub.subscribe('log.>', `durable-${n}`, { start: 'new' })).close()),
  )
  ledger.measure(`${many} durables made`, made / 1_000, 's', { atMost: 5 + count / 50, why: 'two statements each' })
  const after = { ms: await publishes(), buffers: await publishBuffers() }
  ledger.measure(`a publish, p50, with ${many} durables beside with none`, after.ms / before.ms, '×', {
    atMost: 1.5,
    why: 'it writes one row, however many durables there are',
  })
  ledger.measure(`… and in buffers; with none it touches ${before.buffers}`, after.buffers, '', {
    atMost: before.buffers + 4,
    why: 'not a page for a durable',
  })

  const subscriber = start('subscriber', { count })
  ledger.measure(`one process subscribes to ${many}`, (await subscriber.told<number>('subscribed')) / 1_000, 's', {
    atMost: 10,
    why: 'a start takes seconds, not minutes',
  })
  const rounds: Round[] = []
  for (let turn = 0; turn < 6; turn++) {
    // What the round before left to fetch or to ack is not this one's.
    await sleep(1_000)
    subscriber.cue()
    rounds.push((await subscriber.child.next((line) => 'all' in line, 180_000)) as unknown as Round)
  }
  const bulk = rounds.pop() as Round
  ledger.measure('one publish: the first has it after (median of 5)', median(rounds.map(({ firstMs }) => firstMs)), 'ms', {
    atMost: 500,
    why: 'all are woken at once, and one is the first',
  })
  ledger.measure('… and all have it after (median of 5)', median(rounds.map(({ all }) => all)) / 1_000, 's', {
    atMost: 10,
    why: 'a fetch and an ack for each',
  })
  ledger.measure(`100 more: ${(100 * count).toLocaleString('en')} deliveries`, bulk.all / 1_000, 's', {
    atMost: 5 + count / 15,
    why: '1,500 a second in one process',
  })
  ledger.exactly('… of which each durable has the same number: the least', bulk.least, bulk.most, 'each gets everything, and nothing twice')

  await sleep(2_000)
  const secondsIdle = size(10, 4)
  const beforeIdle = await transactions(client)
  const cpu = await busySeconds(client, () => sleep(secondsIdle * 1_000))
  const idle = ((await transactions(client)) - beforeIdle) / secondsIdle
  ledger.measure(`idle: transactions a second of ${many} streams`, idle, '/s', {
    atMost: 1.5 * count + 20,
    why: 'one look a stream in each poll interval of a second',
  })
  ledger.measure('… seconds of work on the server, a second', cpu / secondsIdle, '', { atMost: 1, why: 'half of this machine' })
  subscriber.cue()
  const acted = await subscriber.ended<number>()
  ledger.measure(`memory of a process with ${many} streams`, acted.peakMiB, 'MiB', {
    atMost: 640,
    why: 'a stream is a loop; and 100 messages wait in each at once, a hundred thousand of 5 KB at the most',
  })

  const stats = await timed(async () => {
    const { rows } = await client.query<{ pending: string; in_flight: string }>('select pending, in_flight from klieo.consumer_stats')
    ledger.exactly('rows of consumer_stats', rows.length, count, 'a row per durable')
    ledger.exactly(
      '… that say something is pending or in flight',
      rows.filter(({ pending, in_flight }) => Number(pending) + Number(in_flight) > 0).length,
      0,
      'all was acked',
    )
  })
  ledger.measure('consumer_stats', stats, 'ms', { atMost: 3_000, why: 'a page that a person waits for' })

  await (await bus.pubsub.subscribe('log.>', 'behind', { start: 'new' })).close()
  await bus.pubsub.publishMany(range(50).map(() => ({ subject: 'log.held', payload: 'x' })))
  await client.query(`update klieo.messages set published_at = now() - interval '8 days'`)
  const prunes: number[] = []
  await eventually(
    async () => {
      let removed = 0
      prunes.push(
        await timed(async () => {
          const { rows } = await client.query<{ n: number }>('select klieo.prune_messages(604800000, 5000) as n')
          removed = rows[0]?.n ?? 0
        }),
      )
      return removed === 0
    },
    { timeoutMs: 30_000, what: 'the end of pruning' },
  )
  ledger.measure(`retention with ${count + 1} positions, a round`, Math.max(...prunes), 'ms', {
    atMost: 1_000,
    why: 'in the background, without a long transaction',
  })
  const { rows } = await client.query<{ n: number; held: number }>(
    `select count(*)::int as n, (count(*) filter (where subject = 'log.held'))::int as held from klieo.messages`,
  )
  ledger.exactly('… leaves what one durable has not read', rows[0]?.held ?? 0, 50, 'P13')
  ledger.measure('… and of the rest', (rows[0]?.n ?? 0) - (rows[0]?.held ?? 0), '', {
    atMost: 700,
    why: 'what the others read before they last moved on, every half minute at the least',
  })
}

/** Seconds of statements that a while took, as the server counts them. */
async function busySeconds(client: Load['client'], work: () => Promise<unknown>): Promise<number> {
  const read = async () => {
    const { rows } = await client.query<{ s: number }>(
      'select active_time / 1000 as s from pg_stat_database where datname = current_database()',
    )
    return Number(rows[0]?.s)
  }
  const before = await read()
  await work()
  return (await read()) - before
}

export const durables: Scenario = { name: 'durables', title: 'a thousand durables on one log', actors, run }

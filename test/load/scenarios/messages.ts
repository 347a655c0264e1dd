/** A million stored messages: beginning anywhere in them, looking at them, removing half, a restart, and reading the rest. */

import { PostgresBus, type SubscribeOptions } from '../../../src/index.ts'
import { next } from '../../postgres/support/reading.ts'
import { session } from '../../support/sessions.ts'
import { eventually } from '../../support/wait.ts'
import { type Actor, beside, type Load, median, quantile, type Scenario, timed } from '../scenario.ts'
import { buffersOf } from '../server.ts'

interface Given {
  readonly url: string
  readonly count: number
}

const actors = {
  consumer: async ({ url, count }: Given) => {
    await using bus = await PostgresBus.connect({ connectionString: url })
    await using stream = await bus.pubsub.subscribe('log.>', 'reader')
    let seen = 0
    const ms = await timed(async () => {
      for await (const message of stream) {
        void message.ack()
        if (++seen === count) return
      }
    })
    return { seen, ms }
  },
} satisfies Record<string, Actor>

/** In transactions of 1,000, the first half of them nine days old; one in 100,000 is rare. */
const FILL = `
  do $$
  begin
    for batch in 0..%d / 1000 - 1 loop
      insert into klieo.messages (subject, payload, published_at)
      select case when (batch * 1000 + n) %% 100000 = 50000 then 'log.rare' else 'log.common' end, convert_to(repeat('x', 100), 'UTF8'),
        case when batch < %d / 2000 then now() - interval '9 days' else clock_timestamp() end
      from generate_series(0, 999) as n;
      commit;
    end loop;
  end
  $$`

async function run(load: Load): Promise<void> {
  const { server, client, ledger, size, start } = load
  const count = size(1_000_000, 100_000)
  const many = count.toLocaleString('en')
  await PostgresBus.migrate({ connectionString: server.url })
  await client.query(FILL.replaceAll('%d', String(count)).replaceAll('%%', '%'))
  const { rows: edges } = await client.query<{ last: number; half: Date }>(
    `select max(seq)::float8 as last, (select published_at from klieo.messages where published_at > now() - interval '1 day' order by tx, seq limit 1) as half from klieo.messages`,
  )
  const { last, half } = edges[0] as { last: number; half: Date }
  {
    await using bus = await PostgresBus.connect({ connectionString: server.url, maintenance: false })
    const begin = async (what: string, filter: string, options: SubscribeOptions, seconds: number, why: string) => {
      const ms = await timed(async () => {
        await using stream = await bus.pubsub.subscribe(filter, what, options)
        if (options.start === 'new') await bus.pubsub.publish('log.new', 'x')
        await (await next(stream, 60_000, what)).ack()
      })
      ledger.measure(`a new durable, first message: ${what}`, ms / 1_000, 's', { atMost: seconds, why })
    }
    await begin('all', 'log.>', {}, 1, 'it begins at the first')
    await begin('new', 'log.>', { start: 'new' }, 1, 'it does not look at what is there')
    await begin('seq', 'log.>', { start: { seq: last - 10 } }, 3, 'the log has no index on it, and is passed over')
    await begin('time', 'log.>', { start: { time: half } }, 3, 'likewise')
    await begin('rare', 'log.rare', {}, 2, 'one in a hundred thousand, found by reading them')

    const found: number[] = []
    const all = await timed(async () => {
      await using stream = await bus.pubsub.subscribe('log.rare', 'rare-all')
      while (found.length < count / 100_000) {
        const message = await next(stream, 60_000, 'a rare message')
        found.push(message.seq)
        await message.ack()
      }
    })
    ledger.measure(`all ${count / 100_000} of a filter that takes one in 100,000`, all / 1_000, 's', {
      atMost: 20,
      why: '50,000 passed over a second',
    })

    await (await bus.pubsub.subscribe('log.>', 'behind')).close()
    const page = async (what: string, statement: string, seconds: number) => {
      const ms = await timed(() => client.query(statement))
      ledger.measure(what, ms / 1_000, 's', { atMost: seconds, why: 'somebody waits for the page' })
    }
    await page('message_details: the newest 50', 'select * from klieo.message_details order by seq desc limit 50', 5)
    await page('message_details: one by its seq', `select * from klieo.message_details where seq = ${last - 5}`, 5)
    await page(`consumer_stats: seven durables, one of them behind by ${many}`, 'select * from klieo.consumer_stats', 15)

    await retention(load, bus, count)
  }

  const restarted = await timed(async () => {
    await server.restart()
    await using again = await PostgresBus.connect({ connectionString: server.url, maintenance: false })
    await again.pubsub.publish('log.after', 'x')
  })
  ledger.measure('a restart, until a publish is answered', restarted / 1_000, 's', {
    atMost: 15,
    why: 'nothing is read through at the start',
  })

  await using observer = await session(server.url)
  const { rows } = await observer.query<{ n: number }>(`select count(*)::int as n from klieo.messages where subject like 'log.%'`)
  const stored = rows[0]?.n ?? 0
  const { answer, peakMiB } = await start('consumer', { count: stored }).ended<{ seen: number; ms: number }>(240_000)
  ledger.exactly('a consumer reads all that is left', answer.seen, stored, 'P3')
  ledger.measure('… messages a second', answer.seen / (answer.ms / 1_000), '/s', { atLeast: 2_000, why: 'a backlog shrinks' })
  ledger.measure('… memory of the process', peakMiB, 'MiB', { atMost: 384, why: 'it holds a batch or two, not the log' })
}

async function retention({ client, ledger }: Load, bus: PostgresBus, count: number): Promise<void> {
  const prune = (messages: number) => `select klieo.prune_messages(604800000, ${messages}) as n`
  // Those that were only begun hold everything; what one has in flight stays, too.
  await client.query(`delete from klieo.consumer_offsets`)
  await client.query(`delete from klieo.deliveries`)
  const rounds: number[] = []
  const removing = eventually(
    async () => {
      let removed = 0
      rounds.push(
        await timed(async () => {
          const { rows } = await client.query<{ n: number }>(prune(5_000))
          removed = rows[0]?.n ?? 0
        }),
      )
      return removed === 0
    },
    { timeoutMs: 120_000, everyMs: 0, what: 'the end of pruning' },
  )
  const { latencies } = await beside(removing, 50, () => bus.pubsub.publish('beside', 'x'))
  ledger.measure('retention of half of it', rounds.reduce((total, ms) => total + ms, 0) / 1_000, 's', {
    atMost: 120,
    why: 'four thousand a second',
  })
  ledger.measure('… a round of 5,000, p99', quantile(rounds, 0.99), 'ms', { atMost: 2_000, why: 'no long transaction' })
  ledger.measure('a publish beside it, p99', quantile(latencies, 0.99), 'ms', { atMost: 250, why: 'publishers do not notice' })
  const { rows } = await client.query<{ old: number; young: number }>(
    `select (count(*) filter (where published_at < now() - interval '8 days'))::int as old,
       (count(*) filter (where published_at > now() - interval '8 days' and subject like 'log.%'))::int as young from klieo.messages`,
  )
  ledger.exactly('… old messages left', rows[0]?.old ?? -1, 0, 'P13')
  ledger.measure('… young ones left', rows[0]?.young ?? 0, '', { atLeast: count / 2, why: 'P13' })
  // Every ten seconds, for ever.
  const idle: number[] = []
  for (let turn = 0; turn < 5; turn++) idle.push(await timed(() => client.query(prune(5_000))))
  ledger.measure('a round with nothing old among the rest', median(idle), 'ms', {
    atMost: 50,
    why: 'every ten seconds for ever: it must not read the log',
  })
  ledger.measure('… in buffers, the removed ones still in the index', await buffersOf(client, prune(5_000)), '')
  // As autovacuum does within a minute.
  await client.query('vacuum klieo.messages')
  ledger.measure('… and vacuumed away', await buffersOf(client, prune(5_000)), '', { atMost: 1_000, why: 'likewise' })
}

export const messages: Scenario = { name: 'messages', title: 'a million stored messages', actors, run }

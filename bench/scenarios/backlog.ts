/** How long a claim takes in front of a backlog. */

import { performance } from 'node:perf_hooks'
import pg from 'pg'
import { PostgresBus } from '../../dist/index.js'
import { type Metric, median } from '../measure.ts'
import type { OwnScenario, Setting } from '../scenario.ts'

const QUEUE = 'backlog'
const SMALL = 1_000
/** Claims of each kind per round; the small and the large backlog are asked in turn, so that nothing drifts between them. */
const CLAIMS = 250

type Jobs = 'ready' | 'delayed' | 'dead'

/**
 * The state itself and not the way to it: a million jobs that died one by one would take longer than all the rest. Columns
 * that are left out have their defaults.
 */
const FILL: Readonly<Record<Jobs, string>> = {
  ready: `insert into large.jobs (queue, run_at, visible_at, payload)
    select $1, clock_timestamp(), clock_timestamp(), convert_to(repeat('a', 100), 'UTF8') from generate_series(1, $2::int)`,
  delayed: `insert into large.jobs (queue, run_at, visible_at, payload)
    select $1, now() + interval '1 day', now() + interval '1 day', convert_to(repeat('a', 100), 'UTF8') from generate_series(1, $2::int)`,
  dead: `insert into large.jobs (queue, run_at, visible_at, died_at, attempts, payload)
    select $1, now() - interval '1 hour', now() - interval '1 hour', now(), 5, convert_to(repeat('a', 100), 'UTF8') from generate_series(1, $2::int)`,
}

async function measureBacklog({ servers, quick }: Setting): Promise<Metric[]> {
  // Two buses of one database: one keeps its small backlog while that of the other grows.
  const connection = { connectionString: servers.postgresUrl, maintenance: false }
  await using small = await PostgresBus.connect({ ...connection, schema: 'small' })
  await using large = await PostgresBus.connect({ ...connection, schema: 'large' })
  const client = new pg.Client({ connectionString: servers.postgresUrl })
  await client.connect()

  await topUp(small, SMALL + 2 * CLAIMS)
  const steps: { name: string; line: string; x: number; kind: Jobs; add: number; reset: boolean }[] = []
  let stored = 0
  for (const backlog of quick ? [1_000, 10_000, 100_000] : [1_000, 10_000, 100_000, 1_000_000]) {
    steps.push({
      name: `backlog of ${backlog.toLocaleString('en')}`,
      line: 'ready',
      x: backlog,
      kind: 'ready',
      add: backlog - stored,
      reset: false,
    })
    stored = backlog
  }
  for (const kind of ['delayed', 'dead'] as const) {
    for (const front of quick ? [100_000] : [1_000, 100_000, 1_000_000]) {
      steps.push({
        name: `${front.toLocaleString('en')} ${kind} in front`,
        line: `${kind} in front`,
        x: front,
        kind,
        add: front,
        reset: true,
      })
    }
  }

  const metrics: Metric[] = []
  for (const { name, line, x, kind, add, reset } of steps) {
    if (reset) await client.query('truncate large.jobs')
    await client.query(FILL[kind], [QUEUE, add])
    // What autovacuum does within a minute of such an insert; what it may do to the timing is not to be measured.
    await client.query('vacuum (analyze) large.jobs, small.jobs')
    await client.query('checkpoint')
    await topUp(large, CLAIMS + (reset ? SMALL : 0))
    await topUp(small, CLAIMS)
    const taken = { small: [] as number[], large: [] as number[] }
    for (let n = 0; n < CLAIMS + 30; n++) {
      const both = { small: await claimOne(small), large: await claimOne(large) }
      if (n < 30) continue // the connections prepare their statements
      taken.small.push(both.small)
      taken.large.push(both.large)
    }
    metrics.push({ name, unit: 'ms', value: median(taken.large), plot: { plot: 'backlog', x, line } })
    metrics.push({
      name: `${name}, ratio to ${SMALL.toLocaleString('en')} beside it`,
      unit: '×',
      value: median(taken.large) / median(taken.small),
    })
  }
  await client.end()
  return metrics
}

async function topUp(bus: PostgresBus, count: number): Promise<void> {
  await bus.jobs.enqueueMany(
    QUEUE,
    Array.from({ length: count }, () => ({ payload: 'a'.repeat(100) })),
  )
}

async function claimOne(bus: PostgresBus): Promise<number> {
  const began = performance.now()
  const job = await bus.jobs.claim(QUEUE, 'bench', 60_000)
  const taken = performance.now() - began
  if (!job) throw new Error('nothing to claim')
  await job.ack()
  return taken
}

export const backlog: OwnScenario = {
  name: 'backlog',
  title: 'time of one claim in front of a backlog (p50)',
  kind: 'own',
  withinS: 240,
  contenders: { 'klieo-bus': measureBacklog },
}

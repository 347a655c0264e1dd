/** What is to hold, as ratios of what was measured in one run. */

import { median } from './measure.ts'
import type { Results, Row } from './results.ts'

export interface Verdict {
  readonly what: string
  readonly against: string
  /** Undefined where one of the two was not measured. */
  readonly ratio?: number
  /** Of runs with the same number. */
  readonly least?: number
  readonly most?: number
  readonly bound: string
  readonly holds?: boolean
}

interface Bound {
  readonly atLeast?: number
  readonly atMost?: number
}

const OURS = 'klieo-bus'

export function judge(results: Results): Verdict[] {
  const find = (scenario: string, contender: string, metric: string) =>
    results.rows.find((row) => row.scenario === scenario && row.contender === contender && row.metric === metric)
  const ours = (scenario: string, metric: string) => find(scenario, OURS, metric)
  const peersOn = (server: string) =>
    Object.entries(results.contenders)
      .filter(([, info]) => info.peer && info.server === server)
      .map(([name]) => name)
  const best = (server: string, scenario: string, metric: string, better: (a: Row, b: Row) => boolean = (a, b) => a.median > b.median) =>
    peersOn(server)
      .map((name) => find(scenario, name, metric))
      .filter((row) => row !== undefined)
      .reduce<Row | undefined>((found, row) => (found === undefined || better(row, found) ? row : found), undefined)
  const fastest = (server: string, scenario: string, metric: string) => best(server, scenario, metric, (a, b) => a.median < b.median)
  const bare = 'bare statements'
  const verdicts: Verdict[] = []
  const add = (what: string, row: Row | undefined, other: Row | undefined, fallback: string, bound: Bound, name?: string) => {
    verdicts.push(verdict(what, row, other, other ? (name ?? other.contender) : fallback, bound))
  }

  const bulk = 'enqueueMany, 1000 a call'
  const enqueue32 = ours('enqueue', '32 callers')
  add('enqueue, 32 callers', enqueue32, best('postgres', 'enqueue', '32 callers'), 'the best peer on Postgres', { atLeast: 15 })
  add('enqueue, 32 callers', enqueue32, best('nats', 'publish', '32 callers'), 'NATS JetStream publish', { atLeast: 1.5 })
  add('enqueue, 32 callers', enqueue32, find('enqueue', 'bare inserts, gathered', '32 callers'), 'bare inserts, gathered', { atLeast: 0.6 })
  add('enqueue, one caller', ours('enqueue', '1 caller'), find('enqueue', bare, '1 caller'), bare, { atLeast: 0.9 })
  add('enqueueMany, 1,000 a call', ours('enqueue', bulk), find('enqueue', bare, bulk), bare, { atLeast: 0.7 })
  add('enqueueMany, 1,000 a call', ours('enqueue', bulk), best('postgres', 'enqueue', bulk), 'the best peer on Postgres', { atLeast: 3 })
  add('drain', ours('drain', 'drain'), best('postgres', 'drain', 'drain'), 'the best peer on Postgres', { atLeast: 1.5 })
  add('drain', ours('drain', 'drain'), find('drain', bare, 'drain'), bare, { atLeast: 0.8 })
  add('claim and ack, one by one', ours('claim-ack', 'claim + ack'), find('claim-ack', bare, 'claim + ack'), bare, { atLeast: 0.85 })
  for (const [metric, what] of [
    ['idle p50', 'enqueue → handler, idle, p50'],
    ['idle p99', 'enqueue → handler, idle, p99'],
  ] as const) {
    add(what, ours('latency', metric), fastest('postgres', 'latency', metric), 'the fastest peer on Postgres', { atMost: 1 })
    add(what, ours('latency', metric), fastest('redis', 'latency', metric), 'BullMQ on Redis', { atMost: 2 })
  }
  const steady = ours('latency', '500 jobs/s p99')
  add('enqueue → handler, 500 jobs/s, p99', steady, fastest('postgres', 'latency', '500 jobs/s p99'), 'the fastest peer on Postgres', {
    atMost: 1,
  })
  verdicts.push(absolute('enqueue → handler, 500 jobs/s, p99, ms', steady, { atMost: 10 }))
  add('publish, 32 callers', ours('publish', '32 callers'), best('nats', 'publish', '32 callers'), 'NATS JetStream', { atLeast: 1.5 })
  const consumed = 'consume, one durable'
  const natsDefault = results.rows.find((row) => row.scenario === 'consume' && /NATS.*default/i.test(row.contender))
  add('consume with ack, one durable', ours('consume', consumed), natsDefault, 'NATS JetStream, default', { atLeast: 1 })
  const publishTo = (durables: string) => ours('fan-out', `publish, 32 callers, ${durables}`)
  add('publish with five durables', publishTo('5 durables'), publishTo('1 durable'), 'one durable', { atLeast: 0.9 }, 'one durable')
  const consumeAll = (durables: string) => ours('fan-out', `consume, ${durables}`)
  add('consumed by five durables', consumeAll('5 durables'), consumeAll('1 durable'), 'one durable', { atLeast: 3 }, 'one durable')
  const roundTrip = 'round trip p50'
  add('request and reply, p50', ours('request', roundTrip), find('request', 'bare LISTEN/NOTIFY', roundTrip), 'bare LISTEN/NOTIFY', {
    atMost: 3,
  })
  for (const metric of ['put', 'get', 'cas'])
    add(`key-value ${metric}`, ours('kv', metric), best('nats', 'kv', metric), 'NATS KV', { atLeast: 1 })
  for (const metric of ['put', 'cas']) {
    add(`key-value ${metric}`, ours('kv', metric), find('kv-statements', 'pgbench', metric), 'pgbench, 16 clients', { atLeast: 1 })
  }
  for (const clients of [16, 64]) {
    const commits = (with_: string) => ours('wake-ups', `${clients} clients, ${with_}`)
    add(`commits, ${clients} clients`, commits('wake-ups'), commits('no wake-ups'), 'no wake-ups', { atLeast: 0.95 }, 'no wake-ups')
  }
  const last = (scenario: string) => results.rows.filter((row) => row.scenario === scenario && row.contender === OURS).at(-1)
  const [held, free] = [last('snapshot-held'), last('snapshot-free')]
  add(`drain with a snapshot held, ${held?.metric ?? 'after 500,000'}`, held, free, 'no snapshot', { atLeast: 0.9 }, 'no snapshot')
  for (const row of results.rows) {
    if (row.scenario === 'backlog' && row.unit === '×') verdicts.push(absolute(`claim, ${row.metric}`, row, { atMost: 1.3 }))
  }
  return verdicts
}

function verdict(what: string, row: Row | undefined, other: Row | undefined, against: string, bound: Bound): Verdict {
  const known = { what, against, bound: text(bound) }
  if (!row || !other) return known
  const runs = Math.min(row.values.length, other.values.length)
  const ratios = Array.from({ length: runs }, (_, run) => row.values[run]! / other.values[run]!)
  const ratio = median(ratios)
  return { ...known, ratio, least: Math.min(...ratios), most: Math.max(...ratios), holds: within(ratio, bound) }
}

function absolute(what: string, row: Row | undefined, bound: Bound): Verdict {
  const known = { what, against: '', bound: text(bound) }
  return row ? { ...known, ratio: row.median, least: row.min, most: row.max, holds: within(row.median, bound) } : known
}

function within(value: number, { atLeast, atMost }: Bound): boolean {
  return (atLeast === undefined || value >= atLeast) && (atMost === undefined || value <= atMost)
}

function text({ atLeast, atMost }: Bound): string {
  return atLeast === undefined ? `≤ ${atMost}` : `≥ ${atLeast}`
}

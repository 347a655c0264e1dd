/**
 * Connections: as many as the server has, with all four interfaces busy in several processes; then twice as many clients as it has
 * places for, which are told `unavailable` and nothing else, and come back when there is room.
 */

import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import { BusError, PostgresBus, Worker } from '../../../src/index.ts'
import { eventually } from '../../support/wait.ts'
import { type Actor, type Load, quantile, range, type Scenario } from '../scenario.ts'

const MAX = 200
const PACE_MS = 500
/** Not measured: 32 buses open their connections at once, and 8 processes compile what they run. */
const WARM_TURNS = 6

interface Given {
  readonly url: string
  readonly name: string
  readonly buses: number
}

interface Busy {
  readonly calls: Record<string, number>
  readonly latencies: Record<string, number[]>
  readonly errors: Record<string, number>
  readonly seen: { readonly messages: number; readonly jobs: number; readonly changes: number; readonly requests: number }
}

function codeOf(error: unknown): string {
  return error instanceof BusError ? error.code : String(error)
}

function count(counts: Record<string, number>, name: string): void {
  counts[name] = (counts[name] ?? 0) + 1
}

function openPool(url: string, max: number): pg.Pool {
  const pool = new pg.Pool({ connectionString: url, max, application_name: 'load' })
  pool.on('error', () => {})
  return pool
}

const actors = {
  /** Several buses in one process, each with a pool of four; every one calls each interface twice a second. */
  busy: async ({ url, name, buses }: Given, { say, cue }): Promise<Busy> => {
    const latencies: Record<string, number[]> = {}
    const errors: Record<string, number> = {}
    const calls: Record<string, number> = {}
    const seen = { messages: 0, jobs: 0, changes: 0, requests: 0 }
    const pools = range(buses).map(() => openPool(url, 4))
    const opened = await Promise.all(pools.map((pool) => PostgresBus.connect({ pool, migrate: false })))
    const closing: AsyncDisposable[] = []
    for (const [index, bus] of opened.entries()) {
      const subject = `busy.${name}.${index}`
      const stream = await bus.pubsub.subscribe(subject, `${name}-${index}`)
      const watch = await bus.kv.watch(`busy-${name}-${index}`)
      closing.push(
        new Worker(bus.jobs, subject, async () => void seen.jobs++, { concurrency: 4 }),
        await bus.requestReply.respond(subject, (request) => {
          seen.requests++
          return request.payload
        }),
      )
      void (async () => {
        for await (const message of stream) {
          seen.messages++
          await message.ack()
        }
      })().catch((error) => count(errors, codeOf(error)))
      void (async () => {
        for await (const _change of watch) seen.changes++
      })().catch((error) => count(errors, codeOf(error)))
    }
    say({ ready: true })
    await cue()
    const stop = new AbortController()
    const repeat = async (what: string, call: (turn: number) => Promise<unknown>) => {
      await sleep(Math.random() * PACE_MS)
      const under: Promise<void>[] = []
      const mine = latencies[what] ?? []
      latencies[what] = mine
      for (let turn = 0; !stop.signal.aborted; turn++) {
        const began = performance.now()
        count(calls, what)
        under.push(
          call(turn).then(
            () => {
              if (turn >= WARM_TURNS) mine.push(performance.now() - began)
            },
            (error) => count(errors, `${what}: ${codeOf(error)}`),
          ),
        )
        await sleep(PACE_MS)
      }
      await Promise.all(under)
    }
    const loops = opened.flatMap((bus, index) => {
      const subject = `busy.${name}.${index}`
      return [
        repeat('publish', (turn) => bus.pubsub.publish(subject, `${turn}`)),
        repeat('enqueue', (turn) => bus.jobs.enqueue(subject, { payload: `${turn}` })),
        repeat('put', (turn) => bus.kv.put(`busy-${name}-${index}`, `key-${turn % 10}`, `${turn}`)),
        repeat('request', (turn) => bus.requestReply.request(subject, `${turn}`, { timeoutMs: 10_000 })),
      ]
    })
    await cue()
    stop.abort()
    await Promise.all(loops)
    // What is under way has a moment; what has not come then is missing.
    await eventually(() => seen.messages >= (calls.publish ?? 0) && seen.jobs >= (calls.enqueue ?? 0) && seen.changes >= (calls.put ?? 0), {
      timeoutMs: 10_000,
    }).catch(() => {})
    for (const each of closing) await each[Symbol.asyncDispose]()
    await Promise.all(opened.map((bus) => bus.close()))
    await Promise.all(pools.map((pool) => pool.end()))
    return { calls, latencies, errors, seen }
  },

  /** Clients with a connection each and one to listen on, who call again and again, whatever they are told. */
  crowd: async ({ url, buses }: Given, { say, cue }) => {
    const codes: Record<string, number> = {}
    let answered = 0
    let calm = false
    let done = false
    const well = new Set<number>()
    const client = async (index: number) => {
      const pool = openPool(url, 1)
      let bus: PostgresBus | undefined
      for (let turn = 0; !done; turn++) {
        try {
          bus ??= await PostgresBus.connect({ pool, migrate: false, maintenance: false })
          const { kv, jobs, pubsub } = bus
          await [
            () => pubsub.publish('crowd.one', 'x'),
            () => jobs.enqueue('crowd', { payload: 'x' }),
            () => kv.put('crowd', `key-${index}`, 'x'),
            () => kv.get('crowd', `key-${index}`),
          ][turn % 4]?.()
          answered++
          if (calm) well.add(index)
        } catch (error) {
          count(codes, codeOf(error))
          well.delete(index)
        }
        await sleep(200 + Math.random() * 300)
      }
      await bus?.close()
      await pool.end()
    }
    const clients = range(buses).map(client)
    say({ begun: true })
    await cue()
    say({ codes: { ...codes }, answered })
    calm = true
    const began = performance.now()
    const all = await eventually(() => well.size === buses, { timeoutMs: 60_000, everyMs: 50 }).then(
      () => true,
      () => false,
    )
    say({ well: all ? buses : well.size, afterMs: performance.now() - began })
    await cue()
    done = true
    await Promise.all(clients)
    return codes
  },
} satisfies Record<string, Actor>

const sum = (counts: Record<string, number>) => Object.values(counts).reduce((total, n) => total + n, 0)

async function run(load: Load): Promise<void> {
  await PostgresBus.migrate({ connectionString: load.server.url })
  await busy(load)
  await crowd(load)
}

async function busy({ client, ledger, size, start }: Load): Promise<void> {
  const processes = 8
  // A bus has four connections in its pool, one to listen on and one that shows it alive.
  const buses = size(4, 2)
  const seconds = size(15, 4)
  const casts = range(processes).map((index) => start('busy', { name: `p${index}`, buses }))
  for (const cast of casts) await cast.told('ready')
  for (const cast of casts) cast.cue()
  let most = 0
  for (let second = 0; second < seconds * 2; second++) {
    await sleep(500)
    const { rows } = await client.query<{ n: number }>(
      `select count(*)::int as n from pg_stat_activity where backend_type = 'client backend'`,
    )
    most = Math.max(most, rows[0]?.n ?? 0)
  }
  for (const cast of casts) cast.cue()
  const acted = await Promise.all(casts.map((cast) => cast.ended<Busy>()))
  const answers = acted.map(({ answer }) => answer)
  const total = (of: (answer: Busy) => number) => answers.reduce((all, answer) => all + of(answer), 0)
  ledger.measure(`connections of ${processes * buses} buses in ${processes} processes`, most, '', {
    atLeast: processes * buses * 4,
    atMost: processes * buses * 6 + 1,
    why: 'four, one to listen and one for responders each, and the observer',
  })
  ledger.exactly(
    'calls that failed',
    total(({ errors }) => sum(errors)),
    0,
    JSON.stringify(answers.map(({ errors }) => errors).filter((errors) => sum(errors) > 0)),
  )
  for (const what of ['publish', 'enqueue', 'put', 'request']) {
    const latencies = answers.flatMap((answer) => answer.latencies[what] ?? [])
    ledger.measure(`${what}, ${Math.round((processes * buses * 1_000) / PACE_MS)} a second, p50`, quantile(latencies, 0.5), 'ms')
    const [atMost, why] = what === 'request' ? [1_000, 'two wake-ups and four statements'] : [250, 'a user does not see it']
    ledger.measure(`${what}, p99`, quantile(latencies, 0.99), 'ms', { atMost, why })
  }
  const missing = total(({ calls, seen }) => Math.abs((calls.publish ?? 0) - seen.messages) + Math.abs((calls.enqueue ?? 0) - seen.jobs))
  ledger.exactly('messages and jobs that did not come, or came twice', missing, 0, 'nothing lost')
  ledger.exactly(
    'changes that a watch missed',
    total(({ calls, seen }) => (calls.put ?? 0) - seen.changes),
    0,
    'K6',
  )
  ledger.measure('memory of a process with its buses', Math.max(...acted.map(({ peakMiB }) => peakMiB)), 'MiB', {
    atMost: 200,
    why: 'a bus is a pool and little else',
  })
}

async function crowd({ client, ledger, size, start }: Load): Promise<void> {
  const processes = size(10, 6)
  const buses = 40
  const staying = 2
  const enter = (index: number) => start('crowd', { name: `c${index}`, buses })
  // Those that are looked at come last, to a server that is full.
  const first = range(processes - staying).map(enter)
  for (const cast of first) await cast.told('begun')
  const connected = async () => {
    const { rows } = await client.query<{ n: number }>(
      `select count(*)::int as n from pg_stat_activity where backend_type = 'client backend'`,
    )
    return rows[0]?.n ?? 0
  }
  let most = 0
  await eventually(
    async () => {
      most = Math.max(most, await connected())
      return most >= MAX - 20
    },
    { timeoutMs: 60_000, everyMs: 200 },
  ).catch(() => {})
  const rest = range(staying).map((index) => enter(processes - staying + index))
  for (const cast of rest) await cast.told('begun')
  await sleep(size(15, 4) * 1_000)
  ledger.measure(`connections while ${processes * buses} clients want ${2 * processes * buses}`, most, '', {
    atLeast: MAX - 20,
    why: `all of max_connections = ${MAX}, but for those that just come and go`,
  })
  for (const cast of first) await cast.child.kill()
  for (const cast of rest) cast.cue()
  const told = await Promise.all(rest.map(async (cast) => ({ codes: await cast.told<Record<string, number>>('codes') })))
  const codes: Record<string, number> = {}
  for (const each of told) for (const [code, n] of Object.entries(each.codes)) codes[code] = (codes[code] ?? 0) + n
  ledger.measure('calls that were refused', sum(codes), '', { atLeast: 1, why: 'else this shows nothing' })
  ledger.exactly('… with another code than unavailable', sum(codes) - (codes.unavailable ?? 0), 0, JSON.stringify(codes))
  const afters: number[] = []
  let well = 0
  for (const cast of rest) {
    const line = await cast.child.next((said) => 'well' in said, 90_000)
    well += Number(line.well)
    afters.push(Number(line.afterMs))
  }
  ledger.exactly(
    `clients that work again once the other ${(processes - staying) * buses} are gone`,
    well,
    staying * buses,
    'nobody stays behind',
  )
  ledger.measure('… the last of them after', Math.max(...afters) / 1_000, 's', {
    atMost: 15,
    why: 'connections are tried again every few seconds',
  })
  for (const cast of rest) cast.cue()
  for (const cast of rest) await cast.ended(30_000)
}

export const connections: Scenario = {
  name: 'connections',
  title: `${MAX} connections, and 400 clients that want them`,
  settings: { max_connections: String(MAX) },
  actors,
  run,
}

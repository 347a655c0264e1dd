/**
 * A process that uses all four interfaces at once, without a pause, for as long as it is told to: it publishes and reads, enqueues and
 * works, writes keys and watches them, takes leases, asks and answers. It remembers what it was told is done, and tells it on
 * `report`. The server under it may do what it likes.
 */

import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { BusError, PostgresBus, Worker } from '../../../../src/index.ts'

/** What a loop came to since the process began. */
export interface Tally {
  readonly codes: Readonly<Record<string, number>>
  /** When the last call that succeeded was begun; `Date.now()`. */
  readonly lastOk: number
}

export interface Report {
  readonly published: readonly string[]
  readonly publishedOnce: readonly string[]
  readonly received: readonly string[]
  readonly enqueued: readonly string[]
  readonly handled: readonly string[]
  readonly fences: readonly number[]
  readonly increments: number
  readonly perhapsIncremented: number
  readonly lastPut: { readonly value: number; readonly revision: number }
  readonly wrongs: readonly string[]
}

export const KINDS = ['publish', 'publishOnce', 'stream', 'enqueue', 'work', 'put', 'cas', 'lease', 'request', 'watch'] as const
export type Kind = (typeof KINDS)[number]

const [connectionString, schema, name] = process.argv.slice(2) as [string, string, string]
const bus = await PostgresBus.connect({ connectionString, schema, pollIntervalMs: 200 })
const say = (line: object) => process.stdout.write(`${JSON.stringify(line)}\n`)
const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes)

const tallies = new Map<Kind, { codes: Record<string, number>; lastOk: number }>(KINDS.map((kind) => [kind, { codes: {}, lastOk: 0 }]))
const published: string[] = []
const publishedOnce: string[] = []
const received = new Set<string>()
const enqueued: string[] = []
const handled = new Set<string>()
const fences: number[] = []
const wrongs: string[] = []
let increments = 0
let perhapsIncremented = 0
let lastPut = { value: 0, revision: 0 }
let producing = true

function count(kind: Kind, code: string, begunAt = Date.now()): void {
  const tally = tallies.get(kind)!
  tally.codes[code] = (tally.codes[code] ?? 0) + 1
  if (code === 'ok') tally.lastOk = Math.max(tally.lastOk, begunAt)
}

/** @returns the code of the rejection, if it was rejected */
async function attempt(kind: Kind, call: () => Promise<unknown>): Promise<string> {
  const begunAt = Date.now()
  let code = 'ok'
  try {
    await call()
  } catch (error) {
    code = error instanceof BusError ? error.code : `no BusError: ${String(error)}`
  }
  count(kind, code, begunAt)
  return code
}

/** One after another; a pause keeps a small machine from doing nothing else. */
async function loop(round: (n: number) => Promise<void>): Promise<void> {
  for (let n = 1; producing; n++) {
    await round(n)
    await sleep(5)
  }
}

const stream = await bus.pubsub.subscribe('load.>', 'load', { ackWaitMs: 3_000 })
const reading = (async () => {
  for await (const message of stream) {
    received.add(text(message.payload))
    await attempt('stream', () => message.ack())
  }
})()
const watch = await bus.kv.watch('load')
const watching = (async () => {
  const revisions = new Map<string, number>()
  for await (const change of watch) {
    const { key, revision } = change.operation === 'put' ? change.entry : change
    if (revision <= (revisions.get(key) ?? 0)) wrongs.push(`the watch saw revision ${revision} of ${key} after ${revisions.get(key)}`)
    revisions.set(key, revision)
    count('watch', 'ok')
  }
})()
const worker = new Worker(
  bus.jobs,
  'load',
  async (job) => {
    handled.add(text(job.payload))
    count('work', 'ok')
  },
  {
    concurrency: 4,
    leaseTtlMs: 3_000,
    onError: (error) => count('work', error instanceof BusError ? error.code : `no BusError: ${String(error)}`),
  },
)
await bus.requestReply.respond('load.echo', ({ payload }) => payload)

const producers = [
  loop(async (n) => {
    const payload = `${name}-${n}`
    if ((await attempt('publish', () => bus.pubsub.publish(`load.${name}`, payload))) === 'ok') published.push(payload)
  }),
  loop(async (n) => {
    // Whether it happened nobody knows: so it is said again, with the same id.
    const payload = `${name}-once-${n}`
    const again = () => bus.pubsub.publish(`load.${name}`, payload, { msgId: payload })
    while ((await attempt('publishOnce', again)) !== 'ok') await sleep(20)
    publishedOnce.push(payload)
  }),
  loop(async (n) => {
    const payload = `${name}-${n}`
    if ((await attempt('enqueue', () => bus.jobs.enqueue('load', { payload, maxAttempts: 100 }))) === 'ok') enqueued.push(payload)
  }),
  loop(async (value) => {
    await attempt('put', async () => {
      const revision = await bus.kv.put('load', name, `${value}`)
      if (revision <= lastPut.revision) wrongs.push(`put answered revision ${revision} after ${lastPut.revision}`)
      lastPut = { value, revision }
    })
  }),
  loop(async () => {
    let sent = false
    const code = await attempt('cas', async () => {
      const entry = await bus.kv.get('load', 'counter')
      sent = true
      await bus.kv.cas('load', 'counter', `${Number(entry ? text(entry.value) : '0') + 1}`, entry?.revision ?? null)
    })
    if (code === 'ok') increments++
    else if (sent && code !== 'cas_conflict') perhapsIncremented++
  }),
  loop(async () => {
    await attempt('lease', async () => {
      const lease = await bus.kv.lease('load', 'lock', 1_000, { waitMs: 2_000 })
      fences.push(lease.fence)
      await lease.release()
    })
  }),
  loop(async (n) => {
    await attempt('request', async () => {
      const answer = text(await bus.requestReply.request('load.echo', `${n}`, { timeoutMs: 1_000 }))
      if (answer !== `${n}`) wrongs.push(`the answer to ${n} was ${answer}`)
    })
  }),
]
say({ ready: true })

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line) as string
  if (command === 'status') say({ status: Object.fromEntries(tallies) })
  if (command === 'settle') {
    producing = false
    await Promise.all(producers)
    say({ settled: true })
  }
  if (command === 'report') {
    const report: Report = {
      published,
      publishedOnce,
      received: [...received],
      enqueued,
      handled: [...handled],
      fences,
      increments,
      perhapsIncremented,
      lastPut,
      wrongs,
    }
    say({ report })
  }
  if (command === 'close') break
}
process.stdin.destroy()
await bus.close()
await worker.stop({ graceMs: 0 })
await reading
await watching

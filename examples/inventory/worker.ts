/**
 * A worker process. It takes jobs, answers `inventory.stats`, and runs for the lease of the reporter. main.ts starts
 * three: they share nothing but the database and the bus.
 *
 *     DATABASE_URL=… INVENTORY_BUS=… node worker.ts NAME INVENTORY_SCHEMA
 */

import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import {
  type Bus,
  type ClaimedJob,
  decode,
  encode,
  isBusError,
  type Lease,
  PostgresBus,
  type PostgresTx,
  Worker,
  type WorkerOptions,
} from 'klieo-bus'
import { type BusAddress, JOB_LEASE_MS, openBus } from './backend.ts'
import type { News, Order } from './crew.ts'
import { connect, inTransaction, textOf } from './database.ts'
import { measurePackage } from './packages.ts'
import { BUCKET, type PackageJob, PROGRESS, type Progress, QUEUE, REPORTER, RESULTS, type Result, STATS, type Stats } from './topics.ts'

/** Shorter than what is left of a job's after a kill, so that it has moved on before the job is back. */
const REPORTER_LEASE_MS = 1_000
const REPORT_EVERY_MS = 100

const [name = 'worker', inventory = 'inventory'] = process.argv.slice(2)
const INSERT_RESULT = `
  insert into ${inventory}.results as r (path, worker, attempt, installed, licence, files, bytes, sha256)
  values ($1, $2, $3, $4, $5, $6, $7, $8)`

const project = fileURLToPath(new URL('../../', import.meta.url))
const pool = connect(process.env.DATABASE_URL ?? '')
const address: BusAddress = JSON.parse(process.env.INVENTORY_BUS ?? '{}')
// main.ts has brought the schema up to date.
const bus = await openBus(address, pool, false).catch((error: unknown) => {
  process.stderr.write(`${name}: ${textOf(error)}\n`)
  process.exit(1)
})
const stopping = new AbortController()

const options: WorkerOptions = {
  workerId: name,
  leaseTtlMs: JOB_LEASE_MS,
  onError: (error, job) => tell({ news: 'trouble', text: `${job ? `job ${job.id}: ` : ''}${textOf(error)}` }),
}
const worker =
  bus instanceof PostgresBus
    ? new Worker(bus.jobs, QUEUE, (job) => finishInTransaction(bus, job), options)
    : new Worker(bus.jobs, QUEUE, (job) => finishByKeys(bus, job), options)

/**
 * The row, the message and the ack of the job take effect together, or not at all. A job may be handed out twice, as
 * after a crash; what it does happens once, because the ack of a stale claim rejects and takes the row with it.
 */
async function finishInTransaction(bus: PostgresBus, job: ClaimedJob<PostgresTx>): Promise<void> {
  const result = await measure(job)
  await inTransaction(pool, async (tx) => {
    await tx.query(INSERT_RESULT, valuesOf(result))
    await bus.pubsub.publish(subjectOf(result), encode(result), { tx })
    await job.ack({ tx })
    await stage.worstMoment(result.path)
  })
}

/**
 * The row, then the message, then the ack. Whoever gets the job after a crash in between does all of it again: the row is
 * known by its key and stays as it is, the same message is known by its id for two minutes, and by the durables for ever.
 */
async function finishByKeys(bus: Bus, job: ClaimedJob): Promise<void> {
  const { rows } = await pool.query<Result>(
    `${INSERT_RESULT}
     on conflict (path) do update set attempt = excluded.attempt, tries = r.tries + 1
     returning path, worker, attempt, installed, licence, files, bytes::float8 as bytes, sha256`,
    valuesOf(await measure(job)),
  )
  const result = rows[0]!
  await bus.pubsub.publish(subjectOf(result), encode(result), { msgId: result.path })
  await stage.worstMoment(result.path)
  await job.ack()
}

async function measure(job: ClaimedJob): Promise<Result> {
  const { path } = decode<PackageJob>(job.payload)
  if (job.attempt > 1) tell({ news: 'came back', path, attempt: job.attempt })
  return { ...(await measurePackage(project, path)), path, worker: name, attempt: job.attempt }
}

function valuesOf({ path, worker, attempt, installed, licence, files, bytes, sha256 }: Result): unknown[] {
  return [path, worker, attempt, installed, licence, files, bytes, sha256]
}

function subjectOf({ installed }: Result): string {
  return installed ? RESULTS.installed : RESULTS.missing
}

const responder = await bus.requestReply.respond(STATS, async () => encode(await readStats()))

async function readStats(): Promise<Stats> {
  const { rows } = await pool.query<{ results: number; bytes: number }>(
    `select count(*)::int as results, coalesce(sum(bytes), 0)::float8 as bytes from ${inventory}.results`,
  )
  return { worker: name, results: rows[0]!.results, bytes: rows[0]!.bytes }
}

/** Every worker wants the lease; one at a time has it, and the others wait. A holder that dies loses it when it runs out. */
async function reportWhenElected(): Promise<void> {
  const { signal } = stopping
  while (!signal.aborted) {
    try {
      await using lease = await bus.kv.lease(BUCKET, REPORTER, REPORTER_LEASE_MS, { waitMs: 20_000, signal })
      await report(lease)
    } catch (error) {
      if (signal.aborted || isBusError(error, 'closed')) return
      if (!isBusError(error, 'lease_held') && !isBusError(error, 'lease_lost')) {
        tell({ news: 'trouble', text: textOf(error) })
        await sleep(REPORTER_LEASE_MS)
      }
    }
  }
}

async function report(lease: Lease): Promise<void> {
  let renewAt = performance.now() + REPORTER_LEASE_MS / 3
  let written = ''
  while (!stopping.signal.aborted) {
    if (performance.now() >= renewAt) {
      renewAt = performance.now() + REPORTER_LEASE_MS / 3
      await lease.heartbeat()
    }
    const progress: Progress = { ...(await readStats()), fence: lease.fence }
    const text = JSON.stringify(progress)
    if (text !== written) await bus.kv.put(BUCKET, PROGRESS, text)
    written = text
    await sleep(REPORT_EVERY_MS)
  }
}

/**
 * For the demonstration alone: asked to, the worker stops right before its last step, which is the commit, or the ack
 * where there is no transaction. There is no worse moment to be killed.
 */
const stage = {
  pause: undefined as PromiseWithResolvers<void> | undefined,
  async worstMoment(path: string): Promise<void> {
    if (!this.pause) return
    tell({ news: 'holding', path })
    await this.pause.promise
  },
}

function tell(news: News): void {
  if (process.connected) process.send?.(news)
}

async function stop(): Promise<void> {
  stopping.abort()
  stage.pause?.resolve()
  await worker.stop({ graceMs: 2_000 })
  await responder.close()
  await bus.close()
  await pool.end()
  if (process.connected) process.disconnect()
}

process.on('message', (order: Order) => {
  if (order === 'pause') {
    stage.pause ??= Promise.withResolvers()
    tell({ news: 'pausing' })
  } else if (order === 'go on') {
    stage.pause?.resolve()
    stage.pause = undefined
  } else {
    void stop()
  }
})
// Ctrl-C reaches every process of the terminal; main.ts decides what it means. Without main.ts there is nothing to do.
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => {})
process.on('disconnect', () => process.exit())

void reportWhenElected()
tell({ news: 'ready' })

/** A row of the app and a job of the bus. */

import { type Bus, encode, type Job, type JobId, PostgresBus } from 'klieo-bus'
import type pg from 'pg'
import type { AppBus } from './backend.ts'
import { inTransaction, type Schemas } from './database.ts'
import { NEVER_COMMITTED } from './never-committed.ts'
import type { LockedPackage } from './packages.ts'
import { type PackageJob, QUEUE } from './topics.ts'

/** @param beforeCommit what it throws rolls the transaction back */
export async function addPackage(
  bus: AppBus,
  pool: pg.Pool,
  schemas: Schemas,
  found: LockedPackage,
  beforeCommit: () => void = () => {},
): Promise<void> {
  if (bus instanceof PostgresBus) {
    // In one transaction: both exist, or neither does.
    await inTransaction(pool, async (tx) => {
      const jobId = await bus.jobs.enqueue(QUEUE, jobFor(found), { tx })
      await insertPackage(tx, schemas, found, jobId)
      beforeCommit()
    })
  } else {
    // The row first: a job without a row would be work that nobody wanted. A row without a job is found by the sweep.
    await inTransaction(pool, async (tx) => {
      await insertPackage(tx, schemas, found, null)
      beforeCommit()
    })
    await enqueueAndNote(bus, pool, schemas, found, false)
  }
}

type Path = Pick<LockedPackage, 'path'>

function jobFor({ path }: Path): Job {
  const job: PackageJob = { path }
  return { payload: encode(job) }
}

function insertPackage(db: pg.Pool | pg.PoolClient, { inventory }: Schemas, { path, name, version }: LockedPackage, jobId: string | null) {
  return db.query(`insert into ${inventory}.packages (path, name, version, job_id) values ($1, $2, $3, $4)`, [path, name, version, jobId])
}

/** The key makes one job of all calls for a package, for 24 hours at the least: whoever is not sure enqueues again. */
function enqueueByKey(bus: Bus, found: Path): Promise<JobId> {
  return bus.jobs.enqueue(QUEUE, { ...jobFor(found), dedupKey: found.path })
}

async function enqueueAndNote(bus: Bus, pool: pg.Pool, { inventory }: Schemas, found: Path, swept: boolean): Promise<void> {
  const jobId = await enqueueByKey(bus, found)
  await pool.query(`update ${inventory}.packages set job_id = $2, swept = $3 where path = $1`, [found.path, jobId, swept])
}

/**
 * Without transactions: enqueues the rows whose job is not known, because a process died between its steps. An app does
 * so when it starts and every minute or so.
 * @returns how many
 */
export async function sweep(bus: Bus, pool: pg.Pool, schemas: Schemas): Promise<number> {
  const { rows } = await pool.query<Path>(`select path from ${schemas.inventory}.packages where job_id is null`)
  for (const found of rows) await enqueueAndNote(bus, pool, schemas, found, true)
  return rows.length
}

/** What a process leaves that dies before the job is enqueued, and one that dies before it has written down its id. */
export async function addHalf(bus: Bus, pool: pg.Pool, schemas: Schemas, noJob: LockedPackage, unknownJob: LockedPackage): Promise<void> {
  await insertPackage(pool, schemas, noJob, null)
  await insertPackage(pool, schemas, unknownJob, null)
  await enqueueByKey(bus, unknownJob)
}

class ChangedMyMind extends Error {}

/** The same as {@link addPackage}, and then something goes wrong in the app. */
export async function addAndRollBack(bus: AppBus, pool: pg.Pool, schemas: Schemas): Promise<void> {
  try {
    await addPackage(bus, pool, schemas, NEVER_COMMITTED, () => {
      throw new ChangedMyMind()
    })
  } catch (error) {
    if (!(error instanceof ChangedMyMind)) throw error
  }
}

/** A row of the app and a job of the bus, in one transaction: both exist, or neither does. */

import { encode, type PostgresBus } from 'klieo-bus'
import type pg from 'pg'
import { inTransaction, type Schemas } from './database.ts'
import { NEVER_COMMITTED } from './never-committed.ts'
import type { LockedPackage } from './packages.ts'
import { type PackageJob, QUEUE } from './topics.ts'

export async function addPackage(bus: PostgresBus, pool: pg.Pool, schemas: Schemas, found: LockedPackage): Promise<void> {
  await inTransaction(pool, (tx) => writeBoth(bus, tx, schemas, found))
}

async function writeBoth(bus: PostgresBus, tx: pg.PoolClient, { inventory }: Schemas, found: LockedPackage): Promise<void> {
  const job: PackageJob = { path: found.path }
  const jobId = await bus.jobs.enqueue(QUEUE, { payload: encode(job) }, { tx })
  await tx.query(`insert into ${inventory}.packages (path, name, version, job_id) values ($1, $2, $3, $4)`, [
    found.path,
    found.name,
    found.version,
    jobId,
  ])
}

class ChangedMyMind extends Error {}

/** The same as {@link addPackage}, and then something goes wrong in the app. */
export async function addAndRollBack(bus: PostgresBus, pool: pg.Pool, schemas: Schemas): Promise<void> {
  try {
    await inTransaction(pool, async (tx) => {
      await writeBoth(bus, tx, schemas, NEVER_COMMITTED)
      throw new ChangedMyMind()
    })
  } catch (error) {
    if (!(error instanceof ChangedMyMind)) throw error
  }
}

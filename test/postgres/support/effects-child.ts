/**
 * Works a queue until it is killed. Mode "transaction": each job's effect is a row, written in the transaction of its ack; now
 * and then a handler throws, rolls back, or lets its lease run out. Mode "plain": the effect is a row of its own, and a second
 * one says that the ack succeeded.
 */

import pg from 'pg'
import { type ClaimedJob, isBusError, PostgresBus, type PostgresTx, Worker } from '../../../src/index.ts'
import { text } from './outcome.ts'

const [connectionString, schema, queue, leaseTtlMs, mode] = process.argv.slice(2) as [
  string,
  string,
  string,
  string,
  'transaction' | 'plain',
]
const bus = await PostgresBus.connect({ connectionString, schema })
const effects = new pg.Pool({ connectionString, max: 8 })
effects.on('error', () => {})

const unexpected = (what: string, error: unknown) => {
  process.stdout.write(`${JSON.stringify({ unexpected: what, error: String(error) })}\n`)
}

new Worker(bus.jobs, queue, mode === 'plain' ? plain : inTransaction, {
  concurrency: 8,
  leaseTtlMs: Number(leaseTtlMs),
  workerId: `worker-${process.pid}`,
  onError: (error) => {
    if (!isBusError(error, 'lease_lost') && !(error as Error).message.startsWith('the handler')) unexpected('worker', error)
  },
})
process.stdout.write('{"ready":true}\n')

async function plain(job: ClaimedJob<PostgresTx>): Promise<void> {
  await effects.query(`insert into ${schema}.effects (job, payload, worker) values ($1, $2, $3)`, [job.id, text(job.payload), process.pid])
  await job.ack()
  await effects.query(`insert into ${schema}.acks (job) values ($1)`, [job.id])
}

async function inTransaction(job: ClaimedJob<PostgresTx>): Promise<void> {
  const client = await effects.connect()
  let broken: unknown
  try {
    await client.query('begin')
    await client.query(`insert into ${schema}.effects (job, payload, worker) values ($1, $2, $3)`, [job.id, text(job.payload), process.pid])
    const dice = Math.random()
    if (dice < 0.02) {
      await client.query('rollback')
      throw new Error('the handler failed after its effect')
    }
    // Longer than the lease, with the transaction open: nobody must get the job once it is acked, and before that it may be lost.
    if (dice < 0.03) await client.query('select pg_sleep($1)', [(Number(leaseTtlMs) / 1000) * 1.5])
    await job.ack({ tx: client })
    if (dice > 0.99) await client.query('select pg_sleep($1)', [(Number(leaseTtlMs) / 1000) * 1.5])
    if (dice > 0.98) {
      await client.query('rollback')
      // Another may have had it since: the lease ran out above.
      await job.nak(0).catch((error) => {
        if (!isBusError(error, 'lease_lost') && !isBusError(error, 'already_settled')) throw error
      })
      return
    }
    await client.query('commit')
  } catch (error) {
    broken = error
    await client.query('rollback').catch(() => {})
    throw error
  } finally {
    client.release(broken !== undefined && !isBusError(broken, 'lease_lost') && !(broken as Error).message.startsWith('the handler'))
  }
}

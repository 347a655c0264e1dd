/** Draining while somebody holds an old snapshot open: dead rows cannot be removed. */

import pg from 'pg'
import { type Metric, Stopwatch } from '../measure.ts'
import type { ComparedScenario } from '../scenario.ts'
import { fill } from './jobs.ts'

const STEP = 50_000

/**
 * Filled and drained in steps, so that all have passed through the head of the queue when the last step is measured. The held
 * snapshot and none are different runs of one scenario, each on a database of its own.
 */
function scenario(held: boolean): ComparedScenario<'jobs'> {
  return {
    name: held ? 'snapshot-held' : 'snapshot-free',
    title: held ? 'drain with a REPEATABLE READ snapshot held, over jobs processed' : 'the same without one',
    kind: 'jobs',
    peerRuns: 1,
    withinS: 300,
    async measure(session, { servers, quick, serverPid }, contender) {
      // Peers are slower, and their curve has told all by then.
      const total = quick ? 200_000 : contender.name === 'klieo-bus' ? 600_000 : 300_000
      await fill(session, STEP / 10)
      await session.drain(STEP / 10)
      const holder = new pg.Client({ connectionString: servers.postgresUrl })
      await holder.connect()
      if (held) {
        await holder.query('begin isolation level repeatable read')
        await holder.query('select count(*) from pg_class')
      }
      const metrics: Metric[] = []
      for (let processed = 0; processed < total; processed += STEP) {
        await fill(session, STEP)
        const watch = new Stopwatch(serverPid)
        await session.drain(STEP)
        const { seconds, cpu } = watch.stop()
        const line = held ? `${contender.name}, snapshot held` : contender.name
        metrics.push({
          name: `after ${processed.toLocaleString('en')}`,
          unit: 'jobs/s',
          value: STEP / seconds,
          cpu,
          plot: { plot: 'snapshot', x: processed, line },
        })
      }
      await holder.end()
      return metrics
    },
  }
}

export const snapshotHeld: ComparedScenario<'jobs'> = scenario(true)
export const snapshotFree: ComparedScenario<'jobs'> = scenario(false)

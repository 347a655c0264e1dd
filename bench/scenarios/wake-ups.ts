/**
 * What wake-ups cost the commits of others: pgbench publishes through SQL, beside it a bus process with a waiting claim that is
 * woken as often as a busy process rings, every 5 ms, in transactions that do nothing but notify. It finds nothing: what it costs
 * to consume is not what is measured. Without: the same process and claim, nobody rings.
 */

import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { PostgresBus } from '../../dist/index.js'
import { type Metric, median } from '../measure.ts'
import { pgbench } from '../pgbench.ts'
import type { OwnScenario, Setting } from '../scenario.ts'

const PUBLISH = `select klieo.publish('bench.commit', '${'a'.repeat(100)}'::bytea);\n`

async function measureWakeUps({ servers, quick, serverPid }: Setting): Promise<Metric[]> {
  await (await PostgresBus.connect({ connectionString: servers.postgresUrl })).close()
  const bystander = fork(join(import.meta.dirname, '..', 'bystander.ts'), [servers.postgresUrl])
  try {
    await once(bystander, 'message')
    const metrics: Metric[] = []
    for (const clients of [16, 64]) {
      // In turn, twice each: a machine that drifts drifts for both.
      const rates = { silent: [] as number[], ringing: [] as number[] }
      let woken = 0
      for (const state of ['silent', 'ringing', 'ringing', 'silent'] as const) {
        await tell(bystander, state)
        const { perSecond } = await pgbench(servers.postgresUrl, PUBLISH, { clients, seconds: quick ? 2 : 3, serverPid })
        rates[state].push(perSecond)
        woken = Math.max(woken, await tell(bystander, 'silent'))
      }
      metrics.push({ name: `${clients} clients, no wake-ups`, unit: 'commits/s', value: median(rates.silent) })
      metrics.push({ name: `${clients} clients, wake-ups`, unit: 'commits/s', value: median(rates.ringing) })
      metrics.push({ name: `${clients} clients, rings a pgbench run`, unit: 'rings', value: woken })
    }
    return metrics
  } finally {
    bystander.disconnect()
    await once(bystander, 'exit')
  }
}

/** @returns how often it rang since it was told before */
async function tell(bystander: ChildProcess, state: 'silent' | 'ringing'): Promise<number> {
  const answered = once(bystander, 'message')
  bystander.send(state)
  return (await answered)[0] as number
}

export const wakeUps: OwnScenario = {
  name: 'wake-ups',
  title: 'commits of pgbench clients that publish, with and without wake-ups beside them',
  kind: 'own',
  withinS: 120,
  contenders: { 'klieo-bus': measureWakeUps },
}

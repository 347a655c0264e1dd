/** What a bridge relays between PostgreSQL and NATS, beside what is published there without one. */

import { performance } from 'node:perf_hooks'
import { setTimeout as sleep } from 'node:timers/promises'
import { Bridge, type Bus, PostgresBus } from '../../dist/index.js'
import { NatsBus } from '../../dist/nats/index.js'
import { type Metric, Stopwatch } from '../measure.ts'
import { type OwnScenario, payload, type Setting } from '../scenario.ts'

const SUBJECTS = 100
const BATCH = 500
const WARM_UP = 1_000

async function measureBridge({ servers, quick, serverPid, run }: Setting): Promise<Metric[]> {
  // It belongs to the peers.
  if (servers.natsUrl === undefined) return []
  const count = quick ? 5_000 : 20_000
  await using postgres = await PostgresBus.connect({ connectionString: servers.postgresUrl })
  await using nats = await NatsBus.connect({ servers: servers.natsUrl.replace('nats://', ''), prefix: `bridge${process.pid}_${run}` })
  const metrics: Metric[] = []
  const relay = async (name: string, from: Bus, to: Bus, root: string, subjects: number) => {
    await publish(from, root, subjects, WARM_UP)
    await using bridge = new Bridge(from, to, `${root}.>`, { durable: root, maxInFlight: 256 })
    await relayed(bridge, WARM_UP)
    await bridge.stop()
    await publish(from, root, subjects, count)
    const watch = new Stopwatch(serverPid)
    await using measured = new Bridge(from, to, `${root}.>`, { durable: root, maxInFlight: 256 })
    await relayed(measured, count)
    const { seconds, cpu } = watch.stop()
    metrics.push({ name, unit: 'messages/s', value: count / seconds, cpu })
  }
  await publish(nats, 'warm', SUBJECTS, WARM_UP)
  const began = performance.now()
  await publish(nats, 'plain', SUBJECTS, count)
  metrics.push({
    name: 'publish to NATS without a bridge, 256 under way',
    unit: 'messages/s',
    value: (count * 1_000) / (performance.now() - began),
  })
  await relay(`PostgreSQL to NATS, ${SUBJECTS} subjects`, postgres, nats, 'many', SUBJECTS)
  await relay('PostgreSQL to NATS, one subject', postgres, nats, 'one', 1)
  await relay(`NATS to PostgreSQL, ${SUBJECTS} subjects`, nats, postgres, 'back', SUBJECTS)
  return metrics
}

async function publish(bus: Bus, root: string, subjects: number, count: number): Promise<void> {
  for (let from = 0; from < count; from += BATCH) {
    const size = Math.min(BATCH, count - from)
    await bus.pubsub.publishMany(
      Array.from({ length: size }, (_, n) => ({ subject: `${root}.${n % subjects}`, payload: payload(from + n) })),
    )
  }
}

async function relayed(bridge: Bridge, count: number): Promise<void> {
  while (bridge.stats.relayed < count) await Promise.race([sleep(5), bridge.ended])
}

export const bridge: OwnScenario = {
  name: 'bridge',
  title: 'messages relayed by a bridge, each stored on the other side before it is acked',
  kind: 'own',
  withinS: 240,
  contenders: { 'klieo-bus': measureBridge },
}

/** Publish, consume, and several durables on one log. */

import { klieoLog } from '../contenders/klieo.ts'
import type { LogSession } from '../contenders.ts'
import { type Metric, rate, timed } from '../measure.ts'
import { type ComparedScenario, type OwnScenario, payload, payloads, type Setting } from '../scenario.ts'

const CURVE = [4, 16, 64, 256]
const BULK = 1_000
const CONSUMED = 50_000

async function fill(session: LogSession, count: number): Promise<void> {
  const batch = payloads(BULK)
  for (let left = count; left > 0; left -= BULK) await session.publishMany(left >= BULK ? batch : batch.slice(0, left))
}

export const publish: ComparedScenario<'log'> = {
  name: 'publish',
  title: 'publish, each call resolved when the server has acknowledged it',
  kind: 'log',
  withinS: 90,
  async measure(session, { quick, serverPid }) {
    const one = (_: number, turn: number) => session.publish(payload(turn))
    const metrics: Metric[] = []
    for (const callers of [1, 32]) {
      const plot = { plot: 'publish', x: callers }
      const options = { callers, ms: quick ? 700 : 2_000, warmUpMs: quick ? 300 : 500, serverPid, plot }
      metrics.push(await rate(`${callers} caller${callers === 1 ? '' : 's'}`, 'messages/s', options, one))
    }
    for (const callers of CURVE) {
      const plot = { plot: 'publish', x: callers }
      const options = { callers, ms: quick ? 150 : 500, warmUpMs: quick ? 50 : 150, serverPid, plot }
      metrics.push(await rate(`${callers} callers`, 'messages/s', options, one))
    }
    return metrics
  },
}

export const consume: ComparedScenario<'log'> = {
  name: 'consume',
  title: 'consume with an ack each, one durable, one process',
  kind: 'log',
  withinS: 120,
  async measure(session, { quick, serverPid }) {
    const count = quick ? 20_000 : CONSUMED
    await session.reset()
    await session.addDurables(1)
    await fill(session, count / 10)
    await session.consume(count / 10)
    await fill(session, count)
    return [await timed('consume, one durable', 'messages/s', count, serverPid, () => session.consume(count))]
  },
}

/** One durable and five, in turn in one process, so that nothing drifts between the two. */
async function measureFanout({ servers, quick, serverPid }: Setting): Promise<Metric[]> {
  await using session = await klieoLog.open(servers)
  const count = quick ? 10_000 : 30_000
  const metrics: Metric[] = []
  for (const durables of [1, 5]) {
    await session.reset()
    await session.addDurables(durables)
    const name = `${durables} durable${durables === 1 ? '' : 's'}`
    const options = { callers: 32, ms: quick ? 700 : 2_000, warmUpMs: 300, serverPid }
    metrics.push(await rate(`publish, 32 callers, ${name}`, 'messages/s', options, (_, turn) => session.publish(payload(turn))))
    await session.reset()
    await session.addDurables(durables)
    await fill(session, count)
    metrics.push(await timed(`consume, ${name}`, 'messages/s', count * durables, serverPid, () => session.consume(count)))
  }
  return metrics
}

export const fanout: OwnScenario = {
  name: 'fan-out',
  title: 'five durables on one subject (the rate is of all of them together)',
  kind: 'own',
  withinS: 90,
  contenders: { 'klieo-bus': measureFanout },
}

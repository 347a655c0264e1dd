/** Round trips, one after the other. */

import { performance } from 'node:perf_hooks'
import { latencies, Stopwatch } from '../measure.ts'
import { type ComparedScenario, payload } from '../scenario.ts'

export const requests: ComparedScenario<'requests'> = {
  name: 'request',
  title: 'request and reply, sequential round trips',
  kind: 'requests',
  withinS: 60,
  async measure(session, { quick, serverPid }) {
    const measured = async (ms: number) => {
      const taken: number[] = []
      const end = performance.now() + ms
      while (performance.now() < end) {
        const began = performance.now()
        await session.request(payload(taken.length))
        taken.push(performance.now() - began)
      }
      return taken
    }
    await measured(500)
    const watch = new Stopwatch(serverPid)
    const taken = await measured(quick ? 1_000 : 2_500)
    return latencies('round trip', taken, watch.stop().cpu, 'request')
  },
}

/** What is known of the server's time, and how surely. */

import { expect, test } from 'vitest'
import { ServerClock } from '../../src/nats/server-clock.ts'
import { systemClock } from '../../src/runtime/clock.ts'

const OFFSET_MS = 5_000

for (const [when, delayMs] of [
  ['at the beginning of the round trip', 0],
  ['at its end', 200],
] as const) {
  test(`K5 stored ${when}: nobody's time is over before it is over on the server`, async () => {
    let at = 1_000
    const clock = { ...systemClock, now: () => at }
    const server = new ServerClock(clock, async () => {
      const after = at
      const storedAt = after + delayMs + OFFSET_MS
      at += 200
      return { after, storedAt, before: at }
    })
    await server.sample()
    expect(server.atLeast()).toBeLessThanOrEqual(at + OFFSET_MS)
    expect(server.atLeast()).toBeGreaterThanOrEqual(at + OFFSET_MS - 200)
    expect(Math.abs(server.now() - at - OFFSET_MS)).toBeLessThanOrEqual(100)
  })
}

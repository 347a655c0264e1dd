import { expect, test } from 'vitest'
import { BusError } from '../../src/core/index.ts'
import type { Clock } from '../../src/runtime/clock.ts'
import { Settlement, type Whereabouts } from '../../src/runtime/settlement.ts'

const DEADLINE_MS = 1_000

/** A clock whose timers need no time, and that is moved on by hand. */
class HandClock implements Clock {
  at = 0
  now(): number {
    return this.at
  }
  date(): Date {
    return new Date(this.at)
  }
  setTimer(callback: () => void): () => void {
    const timer = setImmediate(callback)
    return () => clearImmediate(timer)
  }
}

class Held extends Settlement {
  readonly #look: () => Whereabouts
  constructor(clock: Clock, look: () => Whereabouts) {
    super(clock, DEADLINE_MS)
    this.#look = look
  }
  describe(): string {
    return 'the delivery'
  }
  protected async whereabouts(): Promise<Whereabouts> {
    return this.#look()
  }
  protected onSettled(): void {}
  ack(settle: () => Promise<boolean>): Promise<void> {
    return this.settle(false, settle, 'gone')
  }
}

/** The first answer is lost; asked again, it is not the holder's any more. */
function answerLost(): () => Promise<boolean> {
  let tries = 0
  return async () => {
    if (++tries === 1) throw new BusError('connection', 'lost')
    return false
  }
}

test('P7 an ack whose answer was lost is done when what it acked is gone in time', async () => {
  await new Held(new HandClock(), () => 'gone').ack(answerLost())
})

test('P7 it is refused when its holder was stopped before he looked: another may have got and settled it meanwhile', async () => {
  const clock = new HandClock()
  const held = new Held(clock, () => {
    clock.at = DEADLINE_MS
    return 'gone'
  })
  await expect(held.ack(answerLost())).rejects.toMatchObject({ code: 'lease_lost' })
})

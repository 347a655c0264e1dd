/** For the tests of what is refused: names.ts and arguments.ts. */

import assert from 'node:assert/strict'
import type { Bus } from '../../core/types.ts'
import { rejects, sameBytes } from './kit.ts'

const LONG_TTL_MS = 60_000

/** Each of the values is refused with `invalid_argument`, and the message names the argument. */
export async function refuses(
  argument: string | RegExp,
  values: readonly unknown[],
  call: (value: never) => Promise<unknown>,
): Promise<void> {
  for (const value of values) {
    try {
      await rejects((async () => call(value as never))(), 'invalid_argument', argument)
    } catch (error) {
      throw new Error(`${argument} = ${shown(value)}: ${(error as Error).message}`, { cause: error })
    }
  }
}

function shown(value: unknown): string {
  if (typeof value === 'string') return JSON.stringify(value.length > 40 ? `${value.slice(0, 40)}…` : value)
  return typeof value === 'object' && value !== null ? Object.prototype.toString.call(value) : String(value)
}

export async function drain(elements: AsyncIterable<unknown>): Promise<void> {
  for await (const _ of elements);
}

/** The queue is as it was: nothing came in, and it works. */
export async function unharmed<Tx>(bus: Bus<Tx>, queue: string): Promise<void> {
  assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS), null)
  await bus.jobs.enqueue(queue, { payload: 'well' })
  sameBytes((await bus.jobs.claim(queue, 'w', LONG_TTL_MS))!.payload, 'well')
}

/** What a scenario is, and what it has to work with. */

import { setTimeout as sleep } from 'node:timers/promises'
import { type Child, startChild } from '../support/child.ts'
import type { Session } from '../support/sessions.ts'
import type { Ledger } from './ledger.ts'
import type { LoadServer } from './server.ts'

/** What an actor has besides its arguments. */
export interface Stage {
  say(line: unknown): void
  /** Resolves at the next word of the runner. */
  cue(): Promise<void>
}

// biome-ignore lint/suspicious/noExplicitAny: arguments come as JSON, and each actor knows its own
export type Actor = (given: any, stage: Stage) => Promise<unknown>

export interface Scenario {
  readonly name: string
  readonly title: string
  readonly settings?: Readonly<Record<string, string>>
  readonly actors: Readonly<Record<string, Actor>>
  run(load: Load): Promise<void>
}

export interface Load {
  readonly server: LoadServer
  /** A superuser's, open before anything else. */
  readonly client: Session
  readonly ledger: Ledger
  readonly quick: boolean
  /** The first for the whole run, the second for the quick one. */
  size(whole: number, quick: number): number
  start(actor: string, given: unknown): Cast
}

export interface Acted<T> {
  readonly answer: T
  /** The largest that the process has been. */
  readonly peakMiB: number
  readonly rssMiB: number
  readonly heapMiB: number
}

/** An actor that was started. */
export class Cast {
  readonly child: Child

  constructor(scenario: string, actor: string, given: unknown) {
    this.child = startChild(new URL('./actor.ts', import.meta.url), {
      args: [scenario, actor, JSON.stringify(given)],
      env: { NODE_NO_WARNINGS: '1' },
    })
  }

  /** The next line with this field. */
  async told<T>(field: string, timeoutMs = 120_000): Promise<T> {
    return (await this.child.next((line) => field in line, timeoutMs))[field] as T
  }

  cue(): void {
    this.child.send({})
  }

  /** @throws when the process ended otherwise, with what it wrote to stderr */
  async ended<T>(timeoutMs = 180_000): Promise<Acted<T>> {
    const acted = (await this.child.next((line) => 'peakMiB' in line, timeoutMs)) as unknown as Acted<T>
    await this.child.exited
    return acted
  }
}

/** @returns ms */
export async function timed(work: () => Promise<unknown>): Promise<number> {
  const began = performance.now()
  await work()
  return performance.now() - began
}

export function quantile(values: readonly number[], share: number): number {
  const sorted = [...values].sort((a, b) => a - b)
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? Number.NaN
}

export const median = (values: readonly number[]): number => quantile(values, 0.5)

/** Calls every `everyMs` until `over` settles, however long the calls take, as users do. @returns the latencies in ms; rejects as a call does */
export async function beside<T>(
  over: Promise<T>,
  everyMs: number,
  call: () => Promise<unknown>,
): Promise<{ result: T; latencies: number[] }> {
  const latencies: number[] = []
  const calls: Promise<void>[] = []
  let done = false
  const end = over.finally(() => {
    done = true
  })
  end.catch(() => {})
  while (!done) {
    const began = performance.now()
    calls.push(call().then(() => void latencies.push(performance.now() - began)))
    await Promise.race([sleep(everyMs), end.catch(() => {})])
  }
  const result = await end
  await Promise.all(calls)
  return { result, latencies }
}

/** So many of `work` at once, in turn over the items. */
export async function inParallel<T>(
  items: readonly T[],
  atOnce: number,
  work: (item: T, index: number) => Promise<unknown>,
): Promise<void> {
  let next = 0
  await Promise.all(
    Array.from({ length: Math.min(atOnce, items.length) }, async () => {
      for (let index = next++; index < items.length; index = next++) await work(items[index] as T, index)
    }),
  )
}

export const range = (count: number): number[] => Array.from({ length: count }, (_, index) => index)

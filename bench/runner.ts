/**
 * Run 1 of every contender, then run 2, and so on: a machine that gets faster or slower does so for all. Each in a child
 * process and on a database of its own, one at a time.
 */

import { fork } from 'node:child_process'
import { join } from 'node:path'
import type { Answer, Task } from './child.ts'
import type { Metric } from './measure.ts'
import type { PostgresServer } from './postgres-server.ts'
import type { Scenario, Setting } from './scenario.ts'

export interface Plan {
  readonly scenarios: readonly { readonly scenario: Scenario; readonly entrants: readonly string[] }[]
  readonly runs: number
  readonly quick: boolean
  readonly peers: boolean
  readonly postgres: PostgresServer
  readonly redisUrl?: string | undefined
  readonly natsUrl?: string | undefined
  /** The server whose CPU is the contender's. */
  serverPidOf(contender: string): number | undefined
  isPeer(contender: string): boolean
  readonly onProgress: (line: string) => void
}

export interface Outcome {
  readonly samples: { readonly scenario: string; readonly contender: string; readonly run: number; readonly metric: Metric }[]
  readonly failures: string[]
}

/** Ends the child that is under way; nothing after it is started. */
export class Aborted extends Error {}

export async function execute(plan: Plan, signal: AbortSignal): Promise<Outcome> {
  const outcome: Outcome = { samples: [], failures: [] }
  for (const { scenario, entrants } of plan.scenarios) {
    const failed = new Set<string>()
    for (let run = 1; run <= plan.runs; run++) {
      // Another one begins each time, so that nobody always follows the same.
      for (const contender of rotated(entrants, run - 1)) {
        const last = 'peerRuns' in scenario && plan.isPeer(contender) ? scenario.peerRuns : undefined
        if (failed.has(contender) || run > (last ?? plan.runs)) continue
        if (signal.aborted) throw new Aborted()
        const began = performance.now()
        const answer = await runOnce(plan, scenario, contender, run, signal)
        const took = `${((performance.now() - began) / 1_000).toFixed(0)} s`
        if ('failure' in answer) {
          failed.add(contender)
          outcome.failures.push(`${scenario.name}, ${contender}, run ${run}: ${answer.failure.split('\n')[0]}`)
          plan.onProgress(`${scenario.name} · ${contender} · run ${run} FAILED after ${took}: ${answer.failure}`)
          continue
        }
        plan.onProgress(`${scenario.name} · ${contender} · run ${run} of ${plan.runs} · ${took}`)
        for (const metric of answer.metrics) outcome.samples.push({ scenario: scenario.name, contender, run, metric })
      }
    }
  }
  return outcome
}

async function runOnce(plan: Plan, scenario: Scenario, contender: string, run: number, signal: AbortSignal): Promise<Answer> {
  const database = await plan.postgres.createDatabase()
  const serverPid = plan.serverPidOf(contender)
  const setting: Setting = {
    servers: {
      postgresUrl: database.url,
      ...(plan.redisUrl === undefined ? {} : { redisUrl: plan.redisUrl }),
      ...(plan.natsUrl === undefined ? {} : { natsUrl: plan.natsUrl }),
    },
    ...(serverPid === undefined ? {} : { serverPid }),
    quick: plan.quick,
    run,
  }
  try {
    return await inChild({ scenario: scenario.name, contender, peers: plan.peers, setting }, scenario.withinS, signal)
  } finally {
    await database.drop()
  }
}

function inChild(task: Task, withinS: number, signal: AbortSignal): Promise<Answer> {
  const { promise, resolve } = Promise.withResolvers<Answer>()
  const child = fork(join(import.meta.dirname, 'child.ts'), [JSON.stringify(task)], { stdio: ['ignore', 'ignore', 'pipe', 'ipc'] })
  let said = ''
  child.stderr?.on('data', (chunk: Buffer) => {
    said = (said + chunk.toString()).slice(-4_000)
  })
  const end = () => void child.kill('SIGKILL')
  const timer = setTimeout(end, withinS * 1_000)
  signal.addEventListener('abort', end, { once: true })
  let answer: Answer | undefined
  child.on('message', (message) => {
    answer = message as Answer
  })
  // Whoever left something running is waited for: the next one has the machine for himself.
  child.on('exit', (code, killedBy) => {
    clearTimeout(timer)
    signal.removeEventListener('abort', end)
    const why = killedBy === 'SIGKILL' && !signal.aborted ? `not done within ${withinS} s` : `ended with ${killedBy ?? code}`
    resolve(answer ?? { failure: `${why}. ${said.trim()}` })
  })
  return promise
}

function rotated<T>(items: readonly T[], by: number): T[] {
  const start = items.length === 0 ? 0 : by % items.length
  return [...items.slice(start), ...items.slice(0, start)]
}

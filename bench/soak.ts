/**
 * The soak: a stream and a worker, in a process of their own, in front of a million messages and a million jobs. They hold no
 * more than their windows, and the process does not grow.
 */

import { fork } from 'node:child_process'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { PostgresBus } from '../dist/index.js'
import { median } from './measure.ts'
import type { PostgresServer } from './postgres-server.ts'
import { payloads } from './scenario.ts'
import { linePlot } from './svg.ts'

export const SOAK = { queue: 'soak', subject: 'soak.log', durable: 'soak', maxInFlight: 256, concurrency: 64 } as const
const BACKLOG = 1_000_000
const BULK = 5_000
/** The last quarter may be so much above the second one; the first is warming up. */
const MAX_GROWTH = 1.1

/** Once a second, from the child. */
export interface Sample {
  readonly seconds: number
  readonly rssMiB: number
  readonly heapMiB: number
  /** Yielded or running, and not settled: the most since the sample before. */
  readonly messages: number
  readonly jobs: number
  /** The same as the database has it, fetched but not yet yielded included. */
  readonly messagesInFlight: number
  readonly jobsRunning: number
  readonly messagesDone: number
  readonly jobsDone: number
}

export interface SoakOptions {
  readonly minutes: number
  /** Where the plot and the samples go. */
  readonly directory: string
  readonly signal: AbortSignal
  readonly onProgress: (line: string) => void
}

export async function runSoak(
  postgres: PostgresServer,
  { minutes, directory, signal, onProgress }: SoakOptions,
): Promise<{ text: string; holds: boolean }> {
  const database = await postgres.createDatabase()
  try {
    await fillBacklog(database.url)
    onProgress(`soak: ${BACKLOG.toLocaleString('en')} messages and as many jobs are stored`)
    const samples = await sampleChild(database.url, minutes, signal, onProgress)
    const { text, holds } = judgeSoak(samples, minutes)
    await writeFile(join(directory, 'soak.svg'), plotSoak(samples))
    await writeFile(join(directory, 'soak.json'), `${JSON.stringify({ minutes, holds, text, samples })}\n`)
    return { text, holds }
  } finally {
    await database.drop()
  }
}

async function fillBacklog(connectionString: string): Promise<void> {
  await using bus = await PostgresBus.connect({ connectionString })
  await (await bus.pubsub.subscribe(SOAK.subject, SOAK.durable)).close()
  const messages = payloads(BULK).map((payload) => ({ subject: SOAK.subject, payload }))
  for (let stored = 0; stored < BACKLOG; stored += BULK) {
    await bus.pubsub.publishMany(messages)
    await bus.jobs.enqueueMany(SOAK.queue, messages)
  }
}

function sampleChild(url: string, minutes: number, signal: AbortSignal, onProgress: (line: string) => void): Promise<Sample[]> {
  const { promise, resolve, reject } = Promise.withResolvers<Sample[]>()
  const samples: Sample[] = []
  const child = fork(join(import.meta.dirname, 'soak-child.ts'), [url, String(minutes)])
  signal.addEventListener('abort', () => void child.kill('SIGKILL'), { once: true })
  child.on('message', (message) => {
    const sample = message as Sample
    samples.push(sample)
    if (samples.length % 30 === 1) onProgress(`soak: ${JSON.stringify(sample)}`)
  })
  child.on('exit', (code) => (code === 0 ? resolve(samples) : reject(new Error(`the soak's process ended with ${code}`))))
  return promise
}

function judgeSoak(samples: readonly Sample[], minutes: number): { text: string; holds: boolean } {
  const quarter = (n: number) => samples.slice(Math.floor((samples.length * (n - 1)) / 4), Math.floor((samples.length * n) / 4))
  const rss = (of: readonly Sample[]) => median(of.map(({ rssMiB }) => rssMiB))
  const growth = rss(quarter(4)) / rss(quarter(2))
  const most = (key: keyof Sample) => Math.max(...samples.map((sample) => sample[key]))
  const last = samples.at(-1)!
  const checks: [string, boolean][] = [
    [
      `stream: at most ${most('messages')} yielded and unsettled, ${most('messagesInFlight')} in the database (maxInFlight ${SOAK.maxInFlight})`,
      most('messages') <= SOAK.maxInFlight && most('messagesInFlight') <= SOAK.maxInFlight,
    ],
    [
      `worker: at most ${most('jobs')} running, ${most('jobsRunning')} in the database (concurrency ${SOAK.concurrency})`,
      most('jobs') <= SOAK.concurrency && most('jobsRunning') <= SOAK.concurrency,
    ],
    [
      `resident memory, medians of the quarters: ${[1, 2, 3, 4].map((n) => rss(quarter(n)).toFixed(0)).join(', ')} MiB; fourth to second ${growth.toFixed(3)} (at most ${MAX_GROWTH})`,
      growth <= MAX_GROWTH,
    ],
    [
      `the backlog lasted: ${last.messagesDone.toLocaleString('en')} messages and ${last.jobsDone.toLocaleString('en')} jobs were done`,
      last.messagesDone < BACKLOG && last.jobsDone < BACKLOG && last.messagesDone > 0 && last.jobsDone > 0,
    ],
  ]
  const lines = checks.map(([what, holds]) => `- ${what}: ${holds ? 'holds' : '**does not hold**'}`)
  const text = `Soak of ${minutes} minutes, a backlog of ${BACKLOG.toLocaleString('en')} messages and as many jobs\n\n${lines.join('\n')}\n`
  return { text, holds: checks.every(([, holds]) => holds) }
}

function plotSoak(samples: readonly Sample[]): string {
  const line = (name: string, key: 'rssMiB' | 'heapMiB') => ({
    name,
    points: samples.map((sample) => [sample.seconds / 60, sample[key]] as const),
  })
  return linePlot({
    title: 'Memory of a process with a stream and a worker, a backlog of a million each',
    xLabel: 'minutes',
    yLabel: 'MiB',
    lines: [line('resident', 'rssMiB'), line('heap in use', 'heapMiB')],
  })
}

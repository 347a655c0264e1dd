/** All peers, what each is better at, and their servers. Importing this imports none of their packages. */

import type { Contender, JobsSession, KvSession, LogSession, RequestSession } from '../contenders.ts'
import { bullMqOnPostgres, bullMqOnRedis } from './bullmq.ts'
import { graphileWorkerDefault, graphileWorkerFarAhead, graphileWorkerTuned } from './graphile-worker.ts'
import { jetStreamConfirmed, jetStreamDefault, jetStreamLarge, natsKv, natsRequests } from './nats.ts'
import { isInstalled } from './packages.ts'
import { pgBoss } from './pg-boss.ts'
import { type Server, startNats, startRedis } from './servers.ts'

export interface Peers {
  readonly jobs: Contender<JobsSession>[]
  readonly log: Contender<LogSession>[]
  readonly kv: Contender<KvSession>[]
  readonly requests: Contender<RequestSession>[]
}

export interface PeerServers extends AsyncDisposable {
  readonly redisUrl?: string
  readonly natsUrl?: string
  readonly redisPid?: number
  readonly natsPid?: number
  readonly versions: Readonly<Record<string, string>>
  readonly settings: Readonly<Record<string, string>>
  /** What is not installed and what to do about it, a line each. */
  readonly missing: readonly string[]
}

const PACKAGES = ['graphile-worker', 'pg-boss', 'bullmq', 'ioredis', '@nats-io/transport-node', '@nats-io/jetstream', '@nats-io/kv']

function ifInstalled<T>(packages: readonly string[], ...contenders: T[]): T[] {
  return packages.every(isInstalled) ? contenders : []
}

const NATS = PACKAGES.filter((name) => name.startsWith('@nats-io/'))

/** Those whose packages are there. */
export const peers: Peers = {
  jobs: [
    ...ifInstalled(['graphile-worker'], graphileWorkerTuned, graphileWorkerFarAhead, graphileWorkerDefault),
    ...ifInstalled(['pg-boss'], pgBoss),
    ...ifInstalled(['bullmq'], bullMqOnPostgres),
    ...ifInstalled(['bullmq', 'ioredis'], bullMqOnRedis),
  ],
  log: ifInstalled(NATS, jetStreamDefault, jetStreamLarge, jetStreamConfirmed),
  kv: ifInstalled(NATS, natsKv),
  requests: ifInstalled(NATS, natsRequests),
}

/** By the library's name. */
export const betterAt: Readonly<Record<string, string>> = {
  'graphile-worker':
    'Jobs of one named queue run strictly one after the other, a job key can replace or reschedule a job that waits, and cron tasks with backfill are built in. A trigger or a function adds jobs with one SQL call, and it has run in production for years.',
  'pg-boss':
    'It schedules by cron and by recurrence rules, limits rates, debounces and groups jobs by a queue’s policy, lets jobs wait for other jobs, keeps finished jobs with their results, and comes with a dashboard. It also runs on CockroachDB, Citus and PGlite.',
  BullMQ:
    'Flows of parent and child jobs, rate limits, repeatable jobs, progress, results and sandboxed processors, with many dashboards around it. On Redis a single job starts sooner than anything that has to wait for a commit in PostgreSQL.',
  NATS: 'Subjects span clusters and leaf nodes, streams are replicated by Raft, clients exist for some forty languages, and a server takes far more connections than PostgreSQL. Its request and reply never touches a disk, and messages need no database to be there at all.',
}

export async function startPeerServers(): Promise<PeerServers> {
  const missing = PACKAGES.filter((name) => !isInstalled(name)).map((name) => `${name} is not installed: run bench/setup once`)
  const absent = (name: string) => {
    missing.push(`${name} is not installed: run bench/setup once`)
    return undefined
  }
  // One after the other: if the second does not start, the first is stopped.
  const redis = (await startRedis()) ?? absent('redis-server')
  const nats = await startNats().then(
    (server) => server ?? absent('nats-server'),
    async (error: unknown) => {
      await redis?.stop()
      throw error
    },
  )
  const started = Object.entries({ Redis: redis, NATS: nats }).filter((entry): entry is [string, Server] => entry[1] !== undefined)
  return {
    ...(redis ? { redisUrl: redis.url, redisPid: redis.pid } : {}),
    ...(nats ? { natsUrl: nats.url, natsPid: nats.pid } : {}),
    versions: Object.fromEntries(started.map(([name, { version }]) => [name, version])),
    settings: Object.fromEntries(started.map(([name, { settings }]) => [name, settings])),
    missing,
    async [Symbol.asyncDispose]() {
      await Promise.all(started.map(([, server]) => server.stop()))
    },
  }
}

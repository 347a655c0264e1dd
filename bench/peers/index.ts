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
    'Jobs of one named queue run strictly one after the other, a job key replaces or reschedules a job that still waits, and a crontab starts jobs, those missed while nothing ran too.',
  'pg-boss':
    'It schedules by cron and by recurrence rules, limits rates, debounces and groups jobs by the policy of a queue, lets jobs wait for other jobs, and keeps what finished with its result. It also runs on CockroachDB, Citus and PGlite.',
  BullMQ:
    'Flows of parent and child jobs, rate limits, repeated jobs, progress, results, and processors in processes of their own. On Redis no commit of a database lies between a job and its start.',
  NATS: 'Subjects span clusters and leaf nodes, streams are replicated by Raft, there are clients for some forty languages, and one server takes far more connections than PostgreSQL. A request and its reply touch no disk, and none of it needs a database.',
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

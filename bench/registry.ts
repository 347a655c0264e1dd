/** Who takes part in what. */

import { bareGathered, bareJobs, barePingPong } from './contenders/bare.ts'
import { klieoJobs, klieoKv, klieoLog, klieoRequests } from './contenders/klieo.ts'
import type { Contender } from './contenders.ts'
import type { Kind, Scenario, Sessions } from './scenario.ts'
import { backlog } from './scenarios/backlog.ts'
import { bridge } from './scenarios/bridge.ts'
import { claimAck, drain, enqueue, latency } from './scenarios/jobs.ts'
import { kv, kvStatements } from './scenarios/kv.ts'
import { consume, fanout, publish } from './scenarios/log.ts'
import { requests } from './scenarios/requests.ts'
import { snapshotFree, snapshotHeld } from './scenarios/snapshot.ts'
import { wakeUps } from './scenarios/wake-ups.ts'

/** In the order of the report. */
export const scenarios: readonly Scenario[] = [
  enqueue,
  drain,
  claimAck,
  latency,
  publish,
  consume,
  fanout,
  requests,
  kv,
  kvStatements,
  wakeUps,
  snapshotFree,
  snapshotHeld,
  backlog,
  bridge,
]

export type Contenders = { readonly [K in Kind]: readonly Contender<Sessions[K]>[] }

export const own: Contenders = {
  jobs: [klieoJobs, bareJobs, bareGathered],
  log: [klieoLog],
  kv: [klieoKv],
  requests: [klieoRequests, barePingPong],
}

export const noPeers: Contenders = { jobs: [], log: [], kv: [], requests: [] }

/** What bench/peers/index.ts gives. */
export interface PeersModule {
  readonly peers: Contenders
  /** By the library's name: what it is better at. */
  readonly betterAt: Readonly<Record<string, string>>
  startPeerServers(): Promise<PeerServers>
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

/** Not known when this is compiled: their packages are installed by bench/setup alone. */
const PEERS: string = './peers/index.ts'

export async function loadPeers(): Promise<PeersModule> {
  return (await import(PEERS)) as PeersModule
}

/** Without those that the scenario says nothing about. */
export function entrants(scenario: Scenario, contenders: Contenders): string[] {
  if (scenario.kind === 'own') return Object.keys(scenario.contenders)
  const all: readonly Contender<unknown>[] = contenders[scenario.kind]
  return (
    all
      .filter(({ leaveOut = [] }) => !leaveOut.some((name) => scenario.name.startsWith(name)))
      // Hundreds of thousands of jobs are too many for one that is given few to drain.
      .filter(({ drains }) => drains === undefined || !scenario.name.startsWith('snapshot'))
      .map(({ name }) => name)
  )
}

/** What a scenario is to the runner. */

import type { Contender, JobsSession, KvSession, LogSession, RequestSession, Servers } from './contenders.ts'
import type { Metric } from './measure.ts'

/** What a child process gets to know. */
export interface Setting {
  readonly servers: Servers
  /** Of the server whose CPU counts, where it can be seen. */
  readonly serverPid?: number
  /** Shorter stretches and smaller backlogs. */
  readonly quick: boolean
  /** Counted from 1. */
  readonly run: number
}

export interface Sessions {
  readonly jobs: JobsSession
  readonly log: LogSession
  readonly kv: KvSession
  readonly requests: RequestSession
}

export type Kind = keyof Sessions

interface Described {
  readonly name: string
  /** A line in the report. */
  readonly title: string
  /** How long a child may take, in s. */
  readonly withinS: number
}

/** The same work for every contender of a kind. */
export interface ComparedScenario<K extends Kind = Kind> extends Described {
  readonly kind: K
  /** One run of a peer tells enough, and is long. @default as many as of the others */
  readonly peerRuns?: number
  measure(session: Sessions[K], setting: Setting, contender: Contender<Sessions[K]>): Promise<Metric[]>
}

/** Work that only the ones named here can be asked to do. */
export interface OwnScenario extends Described {
  readonly kind: 'own'
  readonly contenders: Readonly<Record<string, (setting: Setting) => Promise<Metric[]>>>
}

export type Scenario = OwnScenario | { [K in Kind]: ComparedScenario<K> }[Kind]

/** As in the targets. */
export const PAYLOAD_BYTES = 100

/** Not all alike, so that nothing on the way can be clever. */
export function payload(n: number): Buffer {
  const bytes = Buffer.alloc(PAYLOAD_BYTES, 0x61)
  bytes.writeUInt32BE(n >>> 0, 0)
  // Bytes that JSON can hold: some peers store text.
  for (let index = 0; index < 4; index++) bytes[index] = 0x41 + (bytes[index]! & 15)
  return bytes
}

export function payloads(count: number): Buffer[] {
  return Array.from({ length: count }, (_, n) => payload(n))
}

/** Which faults happen when, and to whom: all of it follows from the seed. */

import { Dice } from './dice.ts'

/** How often each fault is in a deck. A deck is dealt in about 50 seconds, so that a run of a minute has seen them all. */
const DECK = {
  /** kill -9 of a process; another takes its place after `lengthMs`. */
  kill: 4,
  /** SIGSTOP, and SIGCONT after `lengthMs`. */
  stop: 3,
  /** A bus closes in order, and its process opens another. */
  rejoin: 2,
  /** kill -9 of the server, started again after `lengthMs`. */
  serverKill: 1,
  /** The server ends its sessions and starts again. */
  serverRestart: 1,
  /** pg_terminate_backend of a few connections. */
  terminate: 2,
  /** Of those that are in a transaction. */
  terminateInTransaction: 1,
  /** Of those that listen. */
  terminateListeners: 1,
  /** The wires of a process end, in order or with RST. */
  cut: 1,
  reset: 1,
  /** The server's answers to a process wait for `lengthMs`. */
  hold: 1,
  /** Nothing goes either way for `lengthMs`. */
  freeze: 1,
  /** Open wires go silent; they end after `lengthMs`. */
  silence: 1,
  /** New connections are refused for `lengthMs`. */
  refuse: 1,
  /** A repeatable-read transaction is open for `lengthMs`. */
  snapshot: 1,
  vacuum: 1,
  checkpoint: 1,
} as const

export type FaultKind = keyof typeof DECK

export const FAULT_KINDS = Object.keys(DECK) as FaultKind[]

const LENGTHS_MS: Partial<Record<FaultKind, readonly [number, number]>> = {
  kill: [0, 2_500],
  stop: [300, 6_000],
  serverKill: [0, 2_500],
  hold: [200, 4_000],
  freeze: [300, 6_000],
  silence: [4_000, 20_000],
  refuse: [500, 4_000],
  snapshot: [4_000, 20_000],
}
const MEAN_PAUSE_MS = 2_100
const FIRST_AT_MS = 3_000
/** The server is up again, and everybody has noticed. */
const SERVER_PAUSE_MS = 15_000
const SERVER_FAULTS: ReadonlySet<FaultKind> = new Set(['serverKill', 'serverRestart'])

export interface Fault {
  readonly atMs: number
  readonly kind: FaultKind
  /** Says which process or connection: a share of those there are, from 0 up to 1. */
  readonly target: number
  readonly lengthMs: number
}

export function schedule(seed: string, forMs: number): Fault[] {
  const dice = new Dice(`${seed} schedule`)
  const faults: Fault[] = []
  let deck: FaultKind[] = []
  let serverFreeAt = 0
  for (let atMs = FIRST_AT_MS; ; atMs += dice.between(MEAN_PAUSE_MS / 3, (MEAN_PAUSE_MS * 5) / 3)) {
    if (atMs >= forMs) return faults
    if (deck.length === 0) deck = dice.shuffled(FAULT_KINDS.flatMap((kind) => Array<FaultKind>(DECK[kind]).fill(kind)))
    const free = deck.findIndex((kind) => !SERVER_FAULTS.has(kind) || atMs >= serverFreeAt)
    // Nothing but server faults is left in the deck: not so soon.
    if (free < 0) continue
    const [kind] = deck.splice(free, 1) as [FaultKind]
    if (SERVER_FAULTS.has(kind)) serverFreeAt = atMs + SERVER_PAUSE_MS
    const [least, most] = LENGTHS_MS[kind] ?? [0, 0]
    // Beyond most lease times now and then, and mostly not: what is always broken is never used.
    const lengthMs = dice.between(least, dice.chance(0.4) ? most : (least + most) / 2)
    faults.push({ atMs, kind, target: dice.between(0, 999) / 1_000, lengthMs: Math.round(lengthMs) })
  }
}

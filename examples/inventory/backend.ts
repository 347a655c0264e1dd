/**
 * The bus of a run: in the database of the app, or on NATS beside it. A PostgresBus takes part in the app's own
 * transactions. On NATS an order of steps and keys take their place: enqueue.ts, worker.ts and aggregates.ts have both,
 * one beside the other. What needs neither takes any `Bus`.
 */

import { PostgresBus } from 'klieo-bus'
import type { NatsBus } from 'klieo-bus/nats'
import type pg from 'pg'

export const BACKENDS = ['postgres', 'nats'] as const
export type Backend = (typeof BACKENDS)[number]

export type AppBus = PostgresBus | NatsBus

/** What a process must know to open the bus of a run. */
export type BusAddress =
  | { readonly backend: 'postgres'; readonly schema: string }
  | { readonly backend: 'nats'; readonly servers: readonly string[]; readonly prefix: string }

/** Short, so that a job comes back soon after its worker was killed. The worker renews it every third of this. */
export const JOB_LEASE_MS = 2_000

/** @param migrate bring the bus's schema up to date */
export async function openBus(address: BusAddress, pool: pg.Pool, migrate: boolean): Promise<AppBus> {
  if (address.backend === 'postgres') return PostgresBus.connect({ pool, schema: address.schema, migrate })
  // Its clients are loaded only where they are used.
  const { NatsBus } = await import('klieo-bus/nats')
  return NatsBus.connect({ servers: address.servers, prefix: address.prefix, jobAckWaitMs: JOB_LEASE_MS })
}

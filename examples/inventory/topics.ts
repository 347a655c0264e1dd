/** The names that the processes share, and the shape of what goes through them. */

import type { Measured } from './packages.ts'

/** A job per package. */
export const QUEUE = 'inventory'
export interface PackageJob {
  readonly path: string
}

/** A message per result, on one of two subjects. */
export const RESULTS = { installed: 'inventory.result.installed', missing: 'inventory.result.missing', all: 'inventory.result.*' } as const
export interface Result extends Measured {
  readonly path: string
  readonly worker: string
  /** 1 unless somebody had the job before and did not finish it. */
  readonly attempt: number
}

/** Requests, answered by whichever worker is free. */
export const STATS = 'inventory.stats'
export interface Stats {
  readonly worker: string
  readonly results: number
  readonly bytes: number
}

/** In this bucket the holder of the lease on `reporter` writes `progress`. */
export const BUCKET = 'inventory'
export const REPORTER = 'reporter'
export const PROGRESS = 'progress'
export interface Progress extends Stats {
  /** Of the lease: what an earlier holder still writes has a lower one. */
  readonly fence: number
}

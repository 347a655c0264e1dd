/** The checked form of what an operator hands in, and what a job that is not as he thinks is answered with. */

import type { JobState, ListJobsOptions, PurgeMessagesOptions, PurgeQueueOptions } from './admin.ts'
import { checkDate, checkId, checkQueue, invalid, optionsOf, reading } from './checks.ts'
import { BusError } from './errors.ts'

const STATES: readonly JobState[] = ['ready', 'scheduled', 'running', 'dead']
const PURGEABLE = ['ready', 'scheduled', 'dead'] as const

export type PurgeableState = (typeof PURGEABLE)[number]

export function checkJobId(value: unknown, argument = 'id'): asserts value is string {
  checkId(argument, value)
}

export interface CheckedListing {
  readonly queue: string | undefined
  readonly state: JobState | undefined
  readonly after: string | undefined
}

export function checkListing(options: ListJobsOptions | undefined): CheckedListing {
  const { queue, state, after } = optionsOf(options, ['queue', 'state', 'after'])
  if (queue !== undefined) checkQueue(queue)
  if (state !== undefined && !STATES.includes(state)) throw invalid('state', state, `must be one of ${STATES.join(', ')}`)
  if (after !== undefined) checkJobId(after, 'after')
  return { queue, state, after }
}

export function checkPurge(options: PurgeQueueOptions | undefined): readonly PurgeableState[] {
  const { states } = optionsOf(options, ['states'])
  if (states === undefined) return PURGEABLE
  const valid = () => Array.isArray(states) && states.length <= PURGEABLE.length && states.every((state) => PURGEABLE.includes(state))
  if (!reading('states', states, valid))
    throw invalid('states', states, `must be an array of ${PURGEABLE.join(', ')}; what is running is cancelled`)
  return [...new Set(states)]
}

export function checkBefore(options: PurgeMessagesOptions | undefined): Date | undefined {
  const { before } = optionsOf(options, ['before'])
  return before === undefined ? undefined : checkDate('before', before)
}

export function noSuchJob(id: string): BusError {
  return new BusError('not_found', `job ${id} does not exist: it is done, was removed, or never was`)
}

export function jobRuns(id: string): BusError {
  return new BusError('conflict', `job ${id} is running; cancel it first, or wait for the end of its lease`)
}

export function jobIsBeingSettled(id: string): BusError {
  return new BusError('conflict', `job ${id} is being settled by a transaction that is open; try again when that has ended`, {
    retryable: true,
  })
}

export function noSuchDurable(durable: string): BusError {
  return new BusError('not_found', `durable "${durable}" does not exist`)
}

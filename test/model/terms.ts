/**
 * What is known to differ, and is therefore left out of a trace or not looked at: each with the rule of docs/backends.md that says so. What is
 * not here is held to be the same.
 */

import type { Player } from './player.ts'
import type { JobSpec, Step } from './steps.ts'

export interface Terms {
  /** What of a step is played, in all worlds; `undefined`: nothing. */
  playable(step: Step): Step | undefined
  /** What a durable counts as unsettled is what its members hold and what they will get. */
  readonly countsExactly: boolean
  /** A job that was retried waits behind those that waited before. */
  readonly queuesRetried: boolean
  /** A durable was moved. */
  onSeek(player: Player, durable: string): void
}

/** Memory and Postgres: nothing differs. */
export const ALIKE: Terms = {
  playable: (step) => step,
  countsExactly: true,
  queuesRetried: true,
  onSeek: () => {},
}

/** With a world of NATS. */
export const WITH_NATS: Terms = {
  playable(step) {
    switch (step.do) {
      // Nobody moves the time of its server: traces of its own do what takes time.
      case 'advance':
        return undefined
      case 'settleJob':
        return step.how === 'nakLater' ? { ...step, how: 'nak' } : step
      case 'request':
        return { ...step, end: 'close' }
      case 'enqueue':
        return { ...step, job: inOrder(step.job) }
      case 'enqueueMany':
        return { ...step, jobs: step.jobs.map(inOrder) }
      // `maxAckPending`: it is that of whoever created the durable.
      case 'subscribe': {
        const { maxAckPending: _, ...rest } = step
        return rest
      }
      default:
        return step
    }
  },
  // A1: what was purged while it was handed out is counted no more, and what is published before a durable begins is, until somebody reads.
  countsExactly: false,
  // J8: a job that nobody has claimed since it was enqueued or given back still has its ticket from then. From such a queue everything is claimed.
  queuesRetried: false,
  // `fencing` of messages: what was handed out before may be settled, or not.
  onSeek(player, durable) {
    for (const delivery of player.deliveries.filter(({ of }) => of === durable))
      player.deliveries.splice(player.deliveries.indexOf(delivery), 1)
  },
}

/** `priorities`: there are none. J8: jobs come in the order in which they were enqueued, and nothing is due before it was. */
function inOrder({ priority: _, inMs, ...rest }: JobSpec): JobSpec {
  return inMs === undefined || inMs < 0 ? rest : { ...rest, inMs }
}

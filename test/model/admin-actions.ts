import type { BucketInfo, DurableInfo, JobInfo } from '../../src/index.ts'
import type { Seen } from './compare.ts'
import { jobId, leftSeen } from './jobs-actions.ts'
import { collected, type Player, text } from './player.ts'
import { startOf } from './pubsub-actions.ts'
import { DURABLES, FILTERS, QUEUES, REASONS, type Step } from './steps.ts'

type Do<Name extends Step['do']> = Extract<Step, { do: Name }>

export const adminActions = {
  async jobAdmin(player: Player, { bus, job: back, how, reason }: Do<'jobAdmin'>, n: number) {
    const { admin } = await player.bus(bus)
    const id = player.pick(player.jobIds, back)
    if (id === undefined) return 'no job'
    const label = `${n} ${how} a job`
    if (how === 'look') player.start(label, admin.job(id), (job) => job && jobSeen(player, job, text(job.payload), { ...job.headers }))
    else if (how === 'retry') player.start(label, admin.retryJob(id), () => retried(player, ...QUEUES))
    else if (how === 'remove') player.start(label, admin.removeJob(id), () => null)
    else player.start(label, admin.cancelJob(id, reason === undefined ? undefined : REASONS[reason]), () => null)
    return undefined
  },

  async queueAdmin(player: Player, { bus, queue: which, how, states }: Do<'queueAdmin'>, n: number) {
    const { admin } = await player.bus(bus)
    const queue = QUEUES[which] as string
    const label = `${n} ${how} of ${queue}`
    if (how === 'retryDead') player.start(label, admin.retryDead(queue), (count) => retried(player, queue) ?? count)
    else if (how === 'purge') player.start(label, admin.purgeQueue(queue, states === undefined ? {} : { states }), (count) => count)
    else if (how === 'pause') player.start(label, admin.pauseQueue(queue), () => null)
    else if (how === 'resume') player.start(label, admin.resumeQueue(queue), () => null)
    else player.start(label, collected(admin.jobs({ queue })), (jobs) => listed(player, jobs))
  },

  async seek(player: Player, { bus, durable: which, start }: Do<'seek'>, n: number) {
    const { admin } = await player.bus(bus)
    const durable = DURABLES[which] as string
    player.start(`${n} seek`, admin.seekDurable(durable, startOf(player, start)), () => {
      player.terms.onSeek(player, durable)
      return null
    })
  },

  async purgeMessages(player: Player, { bus, filter, agoMs }: Do<'purgeMessages'>, n: number) {
    const { admin } = await player.bus(bus)
    const before = agoMs === undefined ? {} : { before: new Date(player.world.now() - agoMs) }
    player.start(`${n} purgeMessages`, admin.purgeMessages(FILTERS[filter] as string, before), (count) => {
      player.purged = true
      return count
    })
  },

  async overview(player: Player, { bus }: Do<'overview'>, n: number) {
    const { admin } = await player.bus(bus)
    player.start(`${n} queues`, admin.queues(), (queues) =>
      queues.map(({ oldestReadyAt, pausedAt, ...counts }) => ({
        ...counts,
        waiting: oldestReadyAt !== undefined,
        paused: pausedAt !== undefined,
      })),
    )
    player.start(`${n} durables`, admin.durables(), (durables) => durables.map((one) => durableSeen(player, one)))
    player.start(`${n} buckets`, admin.buckets(), (buckets) => buckets.map(bucketSeen))
  },
}

function retried(player: Player, ...queues: readonly string[]): null {
  if (!player.terms.queuesRetried) for (const queue of queues) player.unordered.add(queue)
  return null
}

/** The records of dedup keys hold ids, and how long those are is a backend's own. */
function bucketSeen({ bucket, keys, bytes }: BucketInfo): Seen {
  return { bucket, keys, bytes: bucket.startsWith('dedup.') ? null : bytes }
}

/** A member may have fetched one ahead or not (P10): what was never handed out and what is out are one number. */
function durableSeen({ terms, purged, ahead }: Player, { durable, filter, pending, inFlight, redelivering }: DurableInfo): Seen {
  return { durable, filter, unsettled: (purged || ahead) && !terms.countsExactly ? null : pending + inFlight + redelivering }
}

/** Ids and their order are a backend's own: here, in the order in which they were enqueued. */
function listed(player: Player, jobs: readonly JobInfo[]): Seen {
  const places = new Map(player.jobIds.map((id, place) => [id, place]))
  const sorted = jobs.toSorted((a, b) => (places.get(a.id) ?? 0) - (places.get(b.id) ?? 0))
  return sorted.map((job) => jobSeen(player, job))
}

function jobSeen(player: Player, job: JobInfo, payload?: string, headers?: Seen): Seen {
  const { id, queue, state, priority, attempts, maxAttempts, dedupKey, lastError, payloadBytes } = job
  return {
    id: jobId(id),
    ...{ queue, state, priority, attempts, maxAttempts, payloadBytes },
    ...{ dedupKey, lastError, payload, headers },
    dueInMs: state === 'scheduled' ? leftSeen(player, job.runAt) : null,
    leftMs: job.leasedUntil === undefined ? null : leftSeen(player, job.leasedUntil),
    died: job.diedAt !== undefined,
    enqueued: job.enqueuedAt instanceof Date,
  }
}

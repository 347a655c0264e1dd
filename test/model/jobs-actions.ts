import type { ClaimedJob, Job } from '../../src/index.ts'
import { Ref, type Seen } from './compare.ts'
import { collected, type Player, text } from './player.ts'
import { HEADERS, IDS, type JobSpec, QUEUES, type Step } from './steps.ts'
import { type AnyBus, GRAIN_MS } from './worlds.ts'

type Do<Name extends Step['do']> = Extract<Step, { do: Name }>

const ALL = 1_000

export const jobsActions = {
  async enqueue(player: Player, { bus, queue, job }: Do<'enqueue'>, n: number) {
    const { jobs } = await player.bus(bus)
    player.start(`${n} enqueue`, jobs.enqueue(QUEUES[queue] as string, jobOf(player, job, `j${n}`)), (id) => enqueued(player, id))
  },

  async enqueueMany(player: Player, { bus, queue, jobs: specs }: Do<'enqueueMany'>, n: number) {
    const { jobs } = await player.bus(bus)
    const many = jobs.enqueueMany(
      QUEUES[queue] as string,
      specs.map((spec, index) => jobOf(player, spec, `j${n}.${index}`)),
    )
    player.start(`${n} enqueueMany`, many, (ids) => ids.map((id) => enqueued(player, id)))
  },

  async claim(player: Player, { bus: which, queue: name, ttlMs, limit, waitMs }: Do<'claim'>, n: number) {
    const bus = await player.bus(which)
    const queue = QUEUES[name] as string
    const awaited = `queue ${queue}`
    if (player.awaited.has(awaited)) return 'somebody waits'
    if (waitMs > 0) player.awaited.add(awaited)
    const done = () => player.awaited.delete(awaited)
    if (player.unordered.has(queue)) {
      const claimed = bus.jobs.claimMany(queue, 'w', ttlMs, { limit: ALL, waitMs }).finally(done)
      const sorted = claimed.then((jobs) => jobs.toSorted((a, b) => (text(a.payload) < text(b.payload) ? -1 : 1)))
      player.start(`${n} claim of all`, sorted, (jobs) => jobs.map((job) => claimSeen(player, bus, job, waitMs === 0)))
    } else if (limit === 0) {
      const claimed = bus.jobs.claim(queue, 'w', ttlMs, { waitMs }).finally(done)
      player.start(`${n} claim`, claimed, (job) => (job === null ? null : claimSeen(player, bus, job, waitMs === 0)))
    } else {
      const claimed = bus.jobs.claimMany(queue, 'w', ttlMs, { limit, waitMs }).finally(done)
      player.start(`${n} claimMany`, claimed, (jobs) => jobs.map((job) => claimSeen(player, bus, job, waitMs === 0)))
    }
    return undefined
  },

  async settleJob(player: Player, { claim: back, how, delayMs }: Do<'settleJob'>, n: number) {
    const picked = player.pickOpen(player.claims, back, ({ settled }) => settled)
    if (!picked) return 'no claim'
    const { job } = picked
    // Its short delay is the one thing in a trace that could be over by real time, and somebody would see when.
    if (how === 'nakLater' && player.awaited.has(`queue ${job.queue}`)) return 'somebody waits'
    const settle = {
      ack: () => job.ack(),
      nak: () => job.nak(delayMs),
      nakLater: () => job.nak(),
      deadLetter: () => job.deadLetter('given up'),
      heartbeat: () => job.heartbeat(),
      leaseHeartbeat: () => job.lease.heartbeat(),
      release: () => job.lease.release(),
    }[how]
    const extends_ = how === 'heartbeat' || how === 'leaseHeartbeat'
    const label = `${n} ${how} of ${text(job.payload)} (${job.attempt})`
    player.start(label, settle(), () => {
      if (!extends_) picked.settled = true
      return extends_ ? leftSeen(player, job.lease.expiresAt) : null
    })
    if (how !== 'nakLater') return undefined
    // Its delay is drawn at random, from 0.5 to 16 seconds for up to five attempts: not in the middle of it.
    await player.world.rest()
    await player.advance(GRAIN_MS)
    return undefined
  },

  async record(player: Player, { bus, queue, key, how }: Do<'record'>, n: number) {
    const { kv } = await player.bus(bus)
    const bucket = `dedup.${QUEUES[queue]}`
    const id = IDS[key] as string
    if (how === 'delete') player.start(`${n} delete record`, kv.delete(bucket, id), () => null)
    else if (how === 'keys') player.start(`${n} keys of records`, collected(kv.keys(bucket)), (keys) => keys.toSorted())
    else
      player.start(`${n} record`, kv.get(bucket, id), (entry) =>
        entry === null ? null : { job: jobId(text(entry.value)), revision: new Ref(`${bucket}/${id}`, entry.revision) },
      )
  },
}

function jobOf(player: Player, { headers, inMs, dedupKey, ...rest }: JobSpec, payload: string): Job {
  const given = HEADERS[headers]
  return {
    payload,
    ...rest,
    ...(given === undefined ? {} : { headers: given }),
    ...(dedupKey === undefined ? {} : { dedupKey: IDS[dedupKey] as string }),
    ...(inMs === undefined ? {} : { runAt: new Date(player.world.now() + inMs) }),
  }
}

function enqueued(player: Player, id: string): Ref {
  if (!player.jobIds.includes(id)) player.jobIds.push(id)
  return jobId(id)
}

/** @param now it was claimed in this step, not somewhen in the time that passed in it */
function claimSeen(player: Player, bus: AnyBus, job: ClaimedJob, now: boolean): Seen {
  player.claims.push({ bus, of: job.queue, job, settled: false })
  return {
    id: jobId(job.id),
    queue: job.queue,
    payload: text(job.payload),
    headers: { ...job.headers },
    attempt: job.attempt,
    maxAttempts: job.maxAttempts,
    fence: new Ref(`fence of ${text(job.payload)}`, job.lease.fence),
    leftMs: now ? leftSeen(player, job.lease.expiresAt) : null,
  }
}

export function leftSeen(player: Player, expiresAt: Date): number {
  return Math.ceil((expiresAt.getTime() - player.world.now()) / GRAIN_MS) * GRAIN_MS
}

export function jobId(id: string): Ref {
  return new Ref('job', id, false)
}

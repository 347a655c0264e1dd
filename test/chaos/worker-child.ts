/** Works: a Worker, and loops that claim for themselves and settle well, badly, too late or not at all. */

import { type ClaimedJob, type JobQueue, type PostgresTx, Worker } from '../../src/index.ts'
import type { Dice } from './dice.ts'
import { Member, text } from './member.ts'
import type { Call } from './record.ts'
import { Transaction } from './transaction.ts'

type PgJob = ClaimedJob<PostgresTx>

const TTL_MS = 1_500
const LOOPS = 2
const WORKER_LIFE_MS = 20_000

const member = await Member.start()
/** The names of the transactions that are passed to calls of the bus. */
const names = new WeakMap<object, string>()

async function claim(
  jobs: JobQueue<PostgresTx>,
  queue: string,
  ttlMs: number,
  options: { limit: number; waitMs?: number; signal?: AbortSignal },
): Promise<PgJob[]> {
  const call: Call = { do: 'claim', queue, limit: options.limit, ttlMs }
  const claimed = await member.call(
    call,
    () => jobs.claimMany(queue, member.name, ttlMs, options),
    (found) => ({ jobs: found.map(({ id, payload, attempt }) => ({ job: id, id: text(payload), attempt })) }),
  )
  for (const job of claimed) record(job, ttlMs)
  return claimed
}

/** What anybody does with the job is in the record from now on: a Worker settles and heartbeats by itself, and the bus hands back. */
function record(job: PgJob, ttlMs: number): void {
  const what = { job: job.id, attempt: job.attempt, ttlMs }
  const inside = job as PgJob & { putBack(): Promise<void>; handBack(): Promise<void> }
  const [ack, nak, deadLetter, heartbeat] = [job.ack.bind(job), job.nak.bind(job), job.deadLetter.bind(job), job.heartbeat.bind(job)]
  const [putBack, handBack] = [inside.putBack.bind(inside), inside.handBack.bind(inside)]
  Object.assign(inside, {
    ack: (options: { tx?: PostgresTx } = {}) => {
      const tx = options.tx === undefined ? undefined : names.get(options.tx)
      return member.call({ do: 'jobAck', ...what, ...(tx === undefined ? {} : { tx }) }, () => ack(options))
    },
    nak: (delayMs?: number, options?: { error?: string }) =>
      member.call({ do: 'jobNak', ...what, ...(delayMs === undefined ? {} : { delayMs }) }, () => nak(delayMs, options)),
    deadLetter: (reason: string) => member.call({ do: 'jobDeadLetter', ...what }, () => deadLetter(reason)),
    heartbeat: () => member.call({ do: 'jobHeartbeat', ...what }, heartbeat),
    putBack: () => member.call({ do: 'jobPutBack', job: job.id, attempt: job.attempt }, putBack),
    handBack: () => member.call({ do: 'jobPutBack', job: job.id, attempt: job.attempt }, handBack),
  })
}

async function ackIn(job: PgJob, dice: Dice, how: 'commit' | 'rollback', holdMs: number): Promise<void> {
  const transaction = await Transaction.begin(member)
  names.set(transaction.client, transaction.name)
  await transaction.during(async () => {
    await member.tolerated(job.ack({ tx: transaction.client }))
    if (holdMs > 0) await member.hold(holdMs)
    // Never waits for the transaction that is open.
    if (dice.chance(0.3)) await member.tolerated(job.heartbeat())
    if (how === 'commit') await transaction.commit()
    else await transaction.rollback()
  })
}

/** What a handler of a Worker does; without a settlement of its own the Worker acks. */
async function handle(job: PgJob, dice: Dice): Promise<void> {
  await member.pause(dice.between(0, 60))
  if (member.gentle) return
  switch (dice.weighted({ nothing: 60, throws: 12, long: 6, acks: 6, transaction: 8, rolledBack: 4, naks: 2, ends: 2 })) {
    case 'throws':
      throw new Error('the handler failed, as it was asked to')
    case 'long':
      return member.hold(TTL_MS * 2)
    case 'acks':
      return job.ack()
    case 'transaction':
      return ackIn(job, dice, 'commit', 0)
    case 'rolledBack':
      return ackIn(job, dice, 'rollback', 0)
    case 'naks':
      return job.nak(dice.between(0, 500))
    case 'ends':
      return job.deadLetter('the handler gave up')
    default:
      return
  }
}

const workerDice = member.dice('worker')
let worker: Worker<PostgresTx> | undefined
const stopped = new WeakSet<Worker<PostgresTx>>()
let wake: (() => void) | undefined

async function stop(): Promise<void> {
  const running = worker
  if (!running || stopped.has(running)) return
  stopped.add(running)
  await running.stop({ graceMs: workerDice.between(0, 1_000) })
  wake?.()
}
member.onRejoin.add(stop)

/** A Worker lives until its bus closes or it is relieved by another. */
member.takes(async () => {
  const { jobs } = await member.bus()
  const recorded: JobQueue<PostgresTx> = {
    enqueue: jobs.enqueue.bind(jobs),
    enqueueMany: jobs.enqueueMany.bind(jobs),
    claim: jobs.claim.bind(jobs),
    claimMany: (queue, _worker, ttlMs, options) => claim(jobs, queue, ttlMs, options),
  }
  const over = new Promise<void>((resolve) => {
    wake = resolve
    member.ended.addEventListener('abort', () => resolve(), { once: true })
  })
  worker = new Worker(recorded, 'work', (job) => handle(job, workerDice), {
    concurrency: 4,
    leaseTtlMs: TTL_MS,
    workerId: member.name,
    onError: () => {},
  })
  const life = setTimeout(
    () => void stop(),
    member.gentle ? WORKER_LIFE_MS * 100 : workerDice.between(WORKER_LIFE_MS / 2, WORKER_LIFE_MS * 2),
  )
  await over
  clearTimeout(life)
})

class Claimant {
  readonly #queue: string
  readonly #dice: Dice

  constructor(queue: string, name: string) {
    this.#queue = queue
    this.#dice = member.dice(name)
  }

  async step(): Promise<void> {
    const dice = this.#dice
    const { jobs } = await member.bus()
    const found = await claim(jobs, this.#queue, TTL_MS, {
      limit: dice.between(1, 3),
      waitMs: dice.between(0, 2_000),
      signal: member.ended,
    })
    await Promise.all(found.map((job) => member.tolerated(this.#settle(job))))
    await member.pause(dice.between(0, 200))
  }

  async #settle(job: PgJob): Promise<void> {
    const dice = this.#dice
    await member.pause(dice.between(0, 60))
    if (member.gentle) return job.ack()
    const weights = { ack: 45, nak: 8, nakLater: 8, beat: 8, transaction: 8, rolledBack: 5, late: 4, overrun: 6, forget: 5, twice: 3 }
    switch (dice.weighted({ ...weights, deadLetter: 4 })) {
      case 'ack':
        return job.ack()
      case 'nak':
        return job.nak()
      case 'nakLater':
        return job.nak(dice.between(0, 1_500))
      case 'beat':
        for (let times = dice.between(1, 4); times > 0; times--) {
          await member.hold(TTL_MS * 0.6)
          await job.heartbeat()
        }
        return job.ack()
      case 'transaction':
        return ackIn(job, dice, 'commit', 0)
      case 'late':
        return ackIn(job, dice, 'commit', TTL_MS * 1.5)
      case 'rolledBack':
        await ackIn(job, dice, 'rollback', 0)
        return dice.chance(0.5) ? job.nak(0) : job.ack()
      case 'overrun':
        await member.hold(TTL_MS * (0.9 + dice.between(0, 10) / 10))
        return dice.chance(0.5) ? job.ack() : job.heartbeat()
      case 'twice':
        await job.ack()
        return dice.chance(0.5) ? job.ack() : job.nak(0)
      case 'deadLetter':
        return job.deadLetter('given up')
      case 'forget':
        return
    }
  }
}

for (const queue of ['claims', 'brittle']) {
  for (let n = 1; n <= LOOPS; n++) {
    const claimant = new Claimant(queue, `${queue} ${n}`)
    member.takes(() => claimant.step())
  }
}

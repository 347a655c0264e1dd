import { describe, expect, test } from 'vitest'
import { caught, Invented } from './invented.ts'

/** A job that was claimed once. */
function claimed(record: Invented): void {
  record.enqueued('7', 'j1', 0, 1)
  record.claimed('7', 'j1', 1, 10, 11)
}

const LETTER = { dlq_reason: 'max_attempts_exceeded', dlq_queue: 'q', dlq_job_id: '7', dlq_attempts: '3' }
const DEAD = { job: '7', id: 'j1', queue: 'q', state: 'dead', attempts: 3, maxAttempts: 3 }

/** A job whose three attempts failed. */
function usedUp(record: Invented): void {
  record.enqueued('7', 'j1', 0, 1)
  for (const attempt of [1, 2, 3]) {
    record.claimed('7', 'j1', attempt, attempt * 10, attempt * 10 + 1)
    record.settleJob('jobNak', '7', attempt, attempt * 10 + 2, attempt * 10 + 3, { ok: true }, { delayMs: 0 })
  }
}

describe('jobs come to an end', () => {
  caught('J1 a job that is gone and was not acked', 'jobs: nothing lost', (record, breaks) => {
    claimed(record)
    record.settleJob('jobAck', '7', 1, 12, 40, breaks ? { err: 'not_found' } : { err: 'connection' })
  })

  caught('J1 one that was acked in a transaction that rolled back', 'jobs: nothing lost', (record, breaks) => {
    claimed(record)
    record.settleJob('jobAck', '7', 1, 12, 13, { ok: true }, { tx: 't' })
    record.call({ do: breaks ? 'rollback' : 'commit', tx: 't' }, 14, 15)
  })

  caught('J1 one that was acked and is still there', 'jobs: acked, gone', (record, breaks) => {
    claimed(record)
    record.settleJob('jobAck', '7', 1, 12, 40, breaks ? { ok: true } : { err: 'connection' })
    record.final.jobs.push({ ...DEAD, state: 'ready', attempts: 1 })
  })

  caught('J1 one whose transaction rolled back', 'jobs: rolled back, not there', (record, breaks) => {
    record.enqueued('7', 'j1', 0, 1, { tx: 't' })
    record.call({ do: breaks ? 'rollback' : 'commit', tx: 't' }, 2, 3)
    record.claimed('7', 'j1', 1, 10, 11)
    record.settleJob('jobAck', '7', 1, 12, 13)
  })

  caught('J1 a job that nobody enqueued', 'jobs: of what was enqueued', (record, breaks) => {
    claimed(record)
    record.settleJob('jobAck', '7', 1, 12, 13)
    if (breaks) record.claimed('8', 'j2', 1, 10, 11)
  })

  caught('J1 an enqueue that made two jobs', 'jobs: enqueued once', (record, breaks) => {
    record.call({ do: 'enqueue', id: 'j1', queue: 'q', maxAttempts: 3 }, 0, 1, { err: 'connection' })
    record.claimed('7', 'j1', 1, 10, 11)
    record.settleJob('jobAck', '7', 1, 12, 13)
    if (breaks) record.claimed('8', 'j1', 1, 10, 11)
  })

  caught('J5 two jobs with one dedup key', 'jobs: one job a dedupKey', (record, breaks) => {
    record.enqueued('7', 'j1', 0, 1, { dedupKey: 'x' })
    record.enqueued(breaks ? '8' : '7', 'j2', 2, 3, { dedupKey: 'x' })
    record.claimed('7', 'j1', 1, 10, 11)
    record.settleJob('jobAck', '7', 1, 12, 13)
    if (breaks) {
      record.claimed('8', 'j2', 1, 10, 11)
      record.settleJob('jobAck', '8', 1, 12, 13)
    }
  })

  caught('J5 a dedup key that was answered another job', 'jobs: one job a dedupKey', (record, breaks) => {
    record.enqueued('7', 'j1', 0, 1, breaks ? {} : { dedupKey: 'x' })
    record.enqueued('7', 'j2', 2, 3, { dedupKey: 'x' })
    record.claimed('7', 'j1', 1, 10, 11)
    record.settleJob('jobAck', '7', 1, 12, 13)
  })

  caught('J4 a dead job without a dead letter', 'jobs: dead letters', (record, breaks) => {
    usedUp(record)
    record.final.jobs.push(DEAD)
    if (!breaks) record.stored(9, 'j1', 'q.dlq', LETTER)
  })

  caught('J4 a dead job with two', 'jobs: dead letters', (record, breaks) => {
    usedUp(record)
    record.final.jobs.push(DEAD)
    record.stored(9, 'j1', 'q.dlq', LETTER)
    if (breaks) record.stored(10, 'j1', 'q.dlq', LETTER)
  })

  caught('J4 a dead letter of a job that lives', 'jobs: dead letters', (record, breaks) => {
    usedUp(record)
    record.final.jobs.push(breaks ? { ...DEAD, state: 'ready' } : DEAD)
    record.stored(9, 'j1', 'q.dlq', LETTER)
  })

  for (const [what, headers] of Object.entries({
    'other attempts': { dlq_attempts: '2' },
    'another queue': { dlq_queue: 'r' },
    'a reason that nobody gave': { dlq_reason: 'tired' },
    'a dedup key that it has not': { dlq_dedup_key: 'x' },
  })) {
    caught(`J4 a dead letter with ${what}`, 'jobs: dead letters', (record, breaks) => {
      usedUp(record)
      record.final.jobs.push(DEAD)
      record.stored(9, 'j1', 'q.dlq', breaks ? { ...LETTER, ...headers } : LETTER)
    })
  }

  caught('J3 a job that is dead before its attempts are used up', 'jobs: dead letters', (record, breaks) => {
    claimed(record)
    record.settleJob(breaks ? 'jobNak' : 'jobDeadLetter', '7', 1, 12, 13)
    record.final.jobs.push({ ...DEAD, attempts: 1 })
    record.stored(9, 'j1', 'q.dlq', { ...LETTER, dlq_attempts: '1', dlq_reason: breaks ? 'max_attempts_exceeded' : 'poison' })
  })

  caught('J4 a job that was acked and has a dead letter', 'jobs: acked, gone', (record, breaks) => {
    claimed(record)
    record.settleJob(breaks ? 'jobAck' : 'jobDeadLetter', '7', 1, 12, 13)
    record.final.jobs.push({ ...DEAD, attempts: 1 })
    record.stored(9, 'j1', 'q.dlq', { ...LETTER, dlq_attempts: '1', dlq_reason: 'poison' })
    if (breaks) record.settleJob('jobDeadLetter', '7', 1, 14, 40, { err: 'lease_lost' })
  })
})

describe('jobs are claimed', () => {
  caught('J3 one more often than maxAttempts', 'jobs: maxAttempts', (record, breaks) => {
    record.enqueued('8', 'j2', 0, 1, { maxAttempts: breaks ? 1 : 2 })
    record.claimed('8', 'j2', 1, 50, 51)
    record.settleJob('jobNak', '8', 1, 52, 53)
    record.claimed('8', 'j2', 2, 60, 61)
    record.settleJob('jobAck', '8', 2, 62, 63)
  })

  caught('J2 an attempt that was claimed twice', 'jobs: an attempt once', (record, breaks) => {
    claimed(record)
    if (!breaks) record.call({ do: 'jobPutBack', job: '7', attempt: 1 }, 12, 13)
    record.claimed('7', 'j1', 1, 2_000, 2_001)
    record.settleJob('jobAck', '7', 1, 2_002, 2_003)
  })

  caught('J3 a gap that no lost claim explains', 'jobs: no gaps', (record, breaks) => {
    claimed(record)
    record.call({ do: 'claim', queue: breaks ? 'r' : 'q', limit: 1, ttlMs: 1_000 }, 2_000, 2_050, { err: 'connection' })
    record.claimed('7', 'j1', 3, 4_000, 4_001)
    record.settleJob('jobAck', '7', 3, 4_002, 4_003)
  })

  caught('J3 more attempts in the end than were seen', 'jobs: no gaps', (record, breaks) => {
    claimed(record)
    if (!breaks) record.call({ do: 'claim', queue: 'q', limit: 1, ttlMs: 1_000 }, 2_000, 2_050, 'none')
    record.fault('kill', 'a')
    record.final.jobs.push({ ...DEAD, state: 'running', attempts: 2 })
  })

  caught('J2 a claim after the ack', 'jobs: settled, never again', (record, breaks) => {
    claimed(record)
    record.settleJob('jobAck', '7', 1, 12, 40, breaks ? { ok: true } : { err: 'connection' })
    record.claimed('7', 'j1', 2, 2_000, 2_001)
    record.settleJob('jobAck', '7', 2, 2_002, 2_040, { err: 'closed' })
  })

  caught('J2 a claim after an ack in a transaction that committed', 'jobs: settled, never again', (record, breaks) => {
    claimed(record)
    record.settleJob('jobAck', '7', 1, 12, 13, { ok: true }, { tx: 't' })
    record.call({ do: breaks ? 'commit' : 'rollback', tx: 't' }, 14, 15)
    record.claimed('7', 'j1', 2, 2_000, 2_001)
    record.settleJob('jobAck', '7', 2, 2_002, 2_040, { err: 'closed' })
  })

  caught('J6 a claim that was settled twice', 'jobs: settled once', (record, breaks) => {
    claimed(record)
    record.settleJob('jobNak', '7', 1, 12, 13)
    record.settleJob('jobAck', '7', 1, 14, 15, breaks ? { ok: true } : { err: 'already_settled' })
    if (!breaks) record.final.jobs.push({ ...DEAD, state: 'ready', attempts: 1 })
  })

  caught('J6 a settlement after the job was claimed again', ['jobs: fencing', 'jobs: leases'], (record, breaks) => {
    claimed(record)
    record.claimed('7', 'j1', 2, 1_100, 1_101)
    record.settleJob('jobHeartbeat', '7', 1, 1_200, 1_201, breaks ? { ok: true } : { err: 'lease_lost' })
    record.settleJob('jobAck', '7', 2, 2_300, 2_301)
  })

  test('J2 a job that was put back and claimed in the same attempt has leases that cannot be told apart', async () => {
    const record = new Invented()
    claimed(record)
    record.call({ do: 'jobPutBack', job: '7', attempt: 1 }, 12, 13)
    record.claimed('7', 'j1', 1, 20, 21)
    record.settleJob('jobNak', '7', 1, 500, 501)
    record.claimed('7', 'j1', 2, 600, 601)
    record.settleJob('jobAck', '7', 2, 700, 701)
    expect((await record.check()).violations).toEqual([])
  })

  caught('J2 a claim while a lease was live', 'jobs: leases', (record, breaks) => {
    claimed(record)
    if (!breaks) record.settleJob('jobNak', '7', 1, 12, 13, { err: 'connection' })
    record.claimed('7', 'j1', 2, 900, 901)
    record.settleJob('jobAck', '7', 2, 1_000, 1_001)
  })

  caught('J2 a claim while a heartbeat kept a lease alive', 'jobs: leases', (record, breaks) => {
    claimed(record)
    record.settleJob('jobHeartbeat', '7', 1, 800, 801, breaks ? { ok: true } : { err: 'connection' })
    record.claimed('7', 'j1', 2, 1_100, 1_101)
    record.settleJob('jobAck', '7', 2, 1_200, 1_201)
  })

  caught('J6 a heartbeat that meets an ack in a transaction on its way extends nothing', 'jobs: leases', (record, breaks) => {
    claimed(record)
    record.settleJob('jobHeartbeat', '7', 1, 700, breaks ? 749 : 800)
    record.settleJob('jobAck', '7', 1, 750, 751, { ok: true }, { tx: 't' })
    record.call({ do: 'rollback', tx: 't' }, 900, 901)
    record.claimed('7', 'j1', 2, 1_100, 1_101)
    record.settleJob('jobAck', '7', 2, 1_200, 1_201)
  })

  caught('J4 a claim before the delay of a nak is over', 'jobs: leases', (record, breaks) => {
    claimed(record)
    record.settleJob('jobNak', '7', 1, 12, 13, { ok: true }, { delayMs: breaks ? 500 : 400 })
    record.claimed('7', 'j1', 2, 440, 441)
    record.settleJob('jobAck', '7', 2, 450, 451)
  })

  caught('J2 a claim while a lease was live whose bus did not close', 'jobs: leases', (record, breaks) => {
    claimed(record)
    record.call({ do: 'close', member: 'a', ...(breaks ? { stream: 's1' } : {}) }, 12, 13)
    record.claimed('7', 'j1', 2, 20, 21, 1_000, 'b')
    record.settleJob('jobAck', '7', 2, 30, 31)
  })
})

describe('leases', () => {
  const lease = (record: Invented, fence: number, from: number, to: number, process = 'a', ttlMs = 1_000) =>
    record.call({ do: 'lease', key: 'l', ttlMs, waitMs: 0 }, from, to, { ok: { fence } }, process)
  const use = (
    record: Invented,
    what: 'leaseHeartbeat' | 'leaseRelease',
    fence: number,
    from: number,
    outcome: { ok: true } | { err: string } = { ok: true },
  ) => record.call({ do: what, key: 'l', fence, ttlMs: 1_000 }, from, from + 1, outcome)

  caught('K5 a fence that fell', 'leases: fences grow', (record, breaks) => {
    lease(record, 2, 0, 1)
    lease(record, breaks ? 1 : 3, 2_000, 2_001)
  })

  caught('K5 a fence that fell, with others in between', 'leases: fences grow', (record, breaks) => {
    lease(record, breaks ? 9 : 2, 0, 1)
    lease(record, breaks ? 10 : 3, 2_000, 2_001)
    lease(record, 4, 4_000, 4_001)
    lease(record, 5, 6_000, 6_001)
  })

  caught('K5 a fence that was given twice', 'leases: fences grow', (record, breaks) => {
    lease(record, 1, 0, 3_000)
    lease(record, breaks ? 1 : 2, 1, 3_001)
  })

  caught('K5 a grant while another was live', 'leases: exclusive', (record, breaks) => {
    lease(record, 1, 0, 1)
    if (!breaks) use(record, 'leaseRelease', 1, 400, { err: 'connection' })
    lease(record, 2, 500, 501)
  })

  caught('K5 a grant while a heartbeat kept another alive', 'leases: exclusive', (record, breaks) => {
    lease(record, 1, 0, 1)
    use(record, 'leaseHeartbeat', 1, 800, breaks ? { ok: true } : { err: 'connection' })
    lease(record, 2, 1_100, 1_101)
  })

  caught('K5 a grant while another was live whose bus did not close', 'leases: exclusive', (record, breaks) => {
    lease(record, 1, 0, 1)
    record.call({ do: 'close', member: 'x' }, 400, 401, { ok: true }, breaks ? 'b' : 'a')
    lease(record, 2, 500, 501, 'b')
  })

  caught('K5 a heartbeat after another was granted it', ['leases: exclusive', 'leases: heartbeat of a lost lease'], (record, breaks) => {
    lease(record, 1, 0, 1)
    lease(record, 2, 1_001, 1_002)
    use(record, 'leaseHeartbeat', 1, 1_003, breaks ? { ok: true } : { err: 'lease_lost' })
  })

  caught('K5 a heartbeat after the lease had run out', 'leases: heartbeat of a lost lease', (record, breaks) => {
    lease(record, 1, 0, 1)
    if (!breaks) use(record, 'leaseHeartbeat', 1, 500, { err: 'connection' })
    use(record, 'leaseHeartbeat', 1, 1_200)
  })
})

describe('requests', () => {
  const ask = (record: Invented, reply: string | undefined) =>
    record.call(
      { do: 'request', id: 'r1', subject: 'ask', timeoutMs: 1_000 },
      0,
      900,
      reply === undefined ? { err: 'timeout' } : { ok: { reply } },
    )
  const handle = (record: Invented, id: string, at: number) => record.write('b', { kind: 'handling', at: at * 1_000, id })

  caught('R4 a reply to another request', 'requests: own reply', (record, breaks) => {
    ask(record, breaks ? 're:r2' : 're:r1')
    handle(record, 'r1', 10)
  })

  caught('R1 a reply that nobody gave', 'requests: own reply', (record, breaks) => {
    ask(record, 're:r1')
    if (!breaks) handle(record, 'r1', 10)
  })

  caught('R1 a request that nobody made', 'requests: own reply', (record, breaks) => {
    ask(record, 're:r1')
    handle(record, 'r1', 10)
    if (breaks) handle(record, 'r2', 10)
  })

  caught('R1 a request that was handled twice', 'requests: handled once', (record, breaks) => {
    ask(record, undefined)
    handle(record, 'r1', 10)
    if (breaks) handle(record, 'r1', 20)
  })

  caught('R4 a request that was begun after its deadline', 'requests: not after the deadline', (record, breaks) => {
    ask(record, undefined)
    handle(record, 'r1', breaks ? 1_300 : 1_200)
  })

  caught('R4 the same, with nothing in its way', 'requests: not after the deadline', (record, breaks) => {
    ask(record, undefined)
    handle(record, 'r1', 5_000)
    record.fault('freeze', breaks ? 'b' : 'a', 1)
  })
})

describe('processes', () => {
  caught('a call that never settles', 'processes: every call settles', (record, breaks) => {
    record.publish('m1', 0, 0, 'none')
    record.fault('kill', breaks ? 'b' : 'a')
  })

  caught('a process that dies by itself', 'processes: none dies by itself', (record, breaks) => {
    record.fault(breaks ? 'died' : 'kill', 'a')
    record.publish('m1', 0, 1, { err: 'connection' })
  })
})

describe('records', () => {
  test('the torn last line of a process that was killed is passed over', async () => {
    const record = new Invented()
    record.published(1, 'm1', 0, 1)
    const report = await record.check('{"kind":"call","op":17,"at":4')
    expect(report.violations).toEqual([])
    expect(report.counts).toMatchObject({ 'publish: ok': 1 })
  })

  test('a torn line before others is an error of the record', async () => {
    const record = new Invented()
    record.published(1, 'm1', 0, 1)
    await expect(record.check('{"kind":"call"\n{"kind":"fault","at":1,"fault":"x"}\n')).rejects.toThrow('no entry')
  })

  test('of each rule only the first 20 violations are kept, and all are counted', async () => {
    const record = new Invented()
    for (let n = 1; n <= 30; n++) record.publish(`m${n}`, n, n, { ok: { seq: n, duplicate: false } })
    const report = await record.check()
    expect(report.violations.length).toBe(20)
    expect(report.broken).toEqual({ 'publish: acknowledged, stored': 30 })
  })
})

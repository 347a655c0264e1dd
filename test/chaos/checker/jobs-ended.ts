/**
 * J1, J3, J4, J5: every job that was enqueued came to an end, once.
 *
 * Assumes: dead jobs stay in their table for the whole run and are not put back; a dead letter carries the payload, so the id, of the
 * enqueue that made the job, and is never removed. Queues are empty at the start. A job that is neither acked nor dead at the end is
 * counted, not blamed. An ack of unknown fate may have ended its job.
 */

import type { Answers, FinalState } from '../record.ts'
import type { Fates } from './fates.ts'
import type { EnqueueCall, History, JobLife, Op, StoredMessage } from './history.ts'
import type { Findings } from './report.ts'

type FinalJob = FinalState['jobs'][number]

export function checkJobsEnded(history: History, fates: Fates, findings: Findings): void {
  const finals = new Map(history.final.jobs.map((job) => [job.job, job]))
  const letters = Map.groupBy(
    history.final.messages.filter(({ headers }) => headers.dlq_job_id !== undefined),
    ({ headers }) => headers.dlq_job_id as string,
  )
  const enqueued = new Map(history.enqueues.map((op) => [op.call.id, op]))
  const ids = idsOfJobs(history, findings)
  const ended = new Set<string>()
  for (const op of history.enqueues) {
    const { fate } = fates.of(op)
    findings.looked(`jobs: enqueue ${fate === 'yes' ? 'took effect' : fate === 'no' ? 'did not' : 'unknown'}`)
    if (fate !== 'yes' || !op.ok) continue
    const { job } = op.answer as Answers['enqueue']
    if (ended.has(job)) continue
    ended.add(job)
    checkEnd(op, history.jobs.get(job), finals.get(job), letters.get(job) ?? [], fates, findings)
  }
  for (const [job, id] of ids) {
    const op = enqueued.get(id)
    const evidence = [history.jobs.get(job)?.grants[0] ?? finals.get(job)]
    if (!op) findings.violation('jobs: of what was enqueued', `job ${job} carries ${id}, which nobody enqueued`, evidence)
    else if (fates.of(op).fate === 'no') {
      findings.violation(
        'jobs: rolled back, not there',
        `job ${job} exists, and its enqueue was refused or rolled back`,
        op,
        op.call.tx === undefined ? [] : fates.commitsOf(op.call.tx),
        evidence,
      )
    }
  }
  for (const [job, found] of letters) {
    const final = finals.get(job)
    if (final?.state !== 'dead')
      findings.violation('jobs: dead letters', `job ${job} has a dead letter, and is not dead`, found, final ?? 'it is gone')
  }
  for (const final of history.final.jobs)
    if (final.state === 'dead')
      checkDead(final, history.jobs.get(final.job), letters.get(final.job) ?? [], enqueued.get(final.id), findings)
  checkIds(ids, findings)
  checkDedup(history, ids, fates, findings)
}

/** The id that each job carries, as claimed or as stored. */
function idsOfJobs(history: History, findings: Findings): Map<string, string> {
  const ids = new Map<string, string>()
  const see = (job: string, id: string, what: unknown) => {
    const other = ids.get(job)
    if (other !== undefined && other !== id)
      findings.violation('jobs: of what was enqueued', `job ${job} was seen with the payloads ${other} and ${id}`, what)
    ids.set(job, id)
  }
  for (const final of history.final.jobs) see(final.job, final.id, final)
  for (const { job, grants } of history.jobs.values()) for (const grant of grants) see(job, grant.id, grant)
  return ids
}

function checkEnd(
  op: Op<EnqueueCall>,
  life: JobLife | undefined,
  final: FinalJob | undefined,
  letters: readonly StoredMessage[],
  fates: Fates,
  findings: Findings,
): void {
  const { job } = op.answer as Answers['enqueue']
  const acks = (life?.settles ?? []).filter(({ call }) => call.do === 'jobAck')
  const acked = acks.filter((ack) => fates.of(ack).fate === 'yes')
  const evidence = () => [op, ...(life?.grants ?? []).slice(-3), ...(life?.settles ?? []).slice(-4)]
  if (acked.length > 0) {
    findings.looked('jobs: acked')
    if (final) findings.violation('jobs: acked, gone', `job ${job} was acked, and is ${final.state} at the end`, acked, final)
    if (letters.length > 0) findings.violation('jobs: acked, gone', `job ${job} was acked, and has a dead letter`, acked, letters)
    return
  }
  if (final) findings.looked(final.state === 'dead' ? 'jobs: dead' : 'jobs: still there')
  else if (acks.some((ack) => fates.of(ack).fate === 'maybe')) findings.looked('jobs: ends that nobody knows')
  else findings.violation('jobs: nothing lost', `job ${job} was enqueued, not acked, and is not there any more`, evidence())
}

function checkDead(
  final: FinalJob,
  life: JobLife | undefined,
  letters: readonly StoredMessage[],
  made: Op<EnqueueCall> | undefined,
  findings: Findings,
): void {
  const fail = (text: string) =>
    findings.violation('jobs: dead letters', `job ${final.job}: ${text}`, final, letters, (life?.grants ?? []).slice(-3))
  const [letter] = letters
  if (letters.length !== 1 || !letter) {
    fail(`it is dead, and has ${letters.length} dead letters`)
    return
  }
  const { id, subject, headers } = letter
  if (subject !== `${final.queue}.dlq` || headers.dlq_queue !== final.queue)
    fail('its dead letter is on another subject than that of its queue')
  if (id !== final.id) fail('its dead letter has another payload')
  if (Number(headers.dlq_attempts) !== final.attempts)
    fail(`it has ${final.attempts} attempts, its dead letter says ${headers.dlq_attempts}`)
  const { dedupKey, maxAttempts } = made?.call ?? {}
  if (headers.dlq_dedup_key !== dedupKey) fail(`its dead letter names the dedup key ${headers.dlq_dedup_key}, not ${dedupKey}`)
  if (maxAttempts !== undefined && final.maxAttempts !== maxAttempts)
    fail(`it allows ${final.maxAttempts} attempts, enqueued with ${maxAttempts}`)
  if (headers.dlq_reason === 'max_attempts_exceeded') {
    if (final.attempts !== final.maxAttempts) fail(`its attempts are used up after ${final.attempts} of ${final.maxAttempts}`)
  } else if (
    !life?.settles.some(({ call, code }) => call.do === 'jobDeadLetter' && call.attempt === final.attempts && code !== 'invalid_argument')
  ) {
    fail(`nobody dead-lettered it in attempt ${final.attempts}`)
  }
}

function checkIds(ids: ReadonlyMap<string, string>, findings: Findings): void {
  const jobs = new Map<string, string>()
  for (const [job, id] of ids) {
    const other = jobs.get(id)
    if (other !== undefined) findings.violation('jobs: enqueued once', `one enqueue made two jobs, ${other} and ${job}`, id)
    jobs.set(id, job)
  }
}

function checkDedup(history: History, ids: ReadonlyMap<string, string>, fates: Fates, findings: Findings): void {
  const effective = history.enqueues.filter((op) => op.ok && fates.of(op).fate === 'yes')
  for (const op of effective) {
    const { job } = op.answer as Answers['enqueue']
    const id = ids.get(job)
    if (op.call.dedupKey === undefined && id !== undefined && id !== op.call.id) {
      findings.violation('jobs: of what was enqueued', `an enqueue was answered job ${job}, which carries ${id}`, op)
    }
  }
  const jobsOf = new Map<string, Set<string>>()
  for (const [job, id] of ids) jobsOf.set(id, (jobsOf.get(id) ?? new Set()).add(job))
  const byKey = Map.groupBy(
    history.enqueues.filter(({ call }) => call.dedupKey !== undefined),
    ({ call }) => `${call.queue} ${call.dedupKey}`,
  )
  for (const [key, ops] of byKey) {
    findings.looked('jobs: dedup keys')
    const jobs = new Set<string>()
    for (const op of ops) {
      if (op.ok && fates.of(op).fate === 'yes') jobs.add((op.answer as Answers['enqueue']).job)
      for (const job of jobsOf.get(op.call.id) ?? []) jobs.add(job)
    }
    if (jobs.size > 1)
      findings.violation('jobs: one job a dedupKey', `the dedup key ${key} has the jobs ${[...jobs].join(', ')}`, ops.slice(0, 6))
    for (const job of jobs) {
      const id = ids.get(job)
      if (id !== undefined && !ops.some(({ call }) => call.id === id)) {
        findings.violation(
          'jobs: one job a dedupKey',
          `the dedup key ${key} was answered job ${job}, which was enqueued without it`,
          ops.slice(0, 6),
        )
      }
    }
  }
}

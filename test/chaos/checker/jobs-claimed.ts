/**
 * J2, J3, J6: who may claim a job, and who may settle it.
 *
 * Assumes: a claim took its jobs between its call and its answer. Every claim counts, so the attempts of a job are numbered without
 * gaps, but for claims whose answers were lost: a gap needs such a claim of the queue, begun before the next one was answered. A
 * number comes twice only if a job was given back that nobody had begun (`jobPutBack`, or the close of a bus).
 *
 * A lease was surely live until: its claim's call (and not before its enqueue, nor before an earlier claim of it) plus its ttl, or the
 * call of a heartbeat that succeeded plus its ttl; a heartbeat while an ack in an open transaction holds the job extends nothing. It
 * ends earlier by a nak that was not refused, by being put back, and by the close of a bus of that process.
 */

import { TOLERANCE_US } from './ack-wait.ts'
import { type Fates, isRefusal } from './fates.ts'
import { type ClaimCall, type Grant, type History, type JobCall, type JobLife, MS, type Op } from './history.ts'
import type { Findings } from './report.ts'

/** How long a claim that was answered with an error may still be under way on the server. */
const LATE_US = 60_000 * MS

export function checkJobsClaimed(history: History, fates: Fates, findings: Findings): void {
  const enqueued = new Map(history.enqueues.map((op) => [op.call.id, op]))
  const finals = new Map(history.final.jobs.map((job) => [job.job, job]))
  const lost = Map.groupBy(
    history.claims.filter((op) => !op.ok && !isRefusal(op)),
    ({ call }) => call.queue,
  )
  for (const life of history.jobs.values()) {
    findings.looked('jobs: claimed')
    const [first] = life.grants
    const made = first && enqueued.get(first.id)
    const final = finals.get(life.job)
    const most = made?.call.maxAttempts ?? final?.maxAttempts ?? Number.POSITIVE_INFINITY
    checkNumbers(life, most, final?.attempts, lost, findings)
    checkSettlements(life, fates, findings)
    checkLeases(life, made ? Math.max(made.at, fates.of(made).fate === 'yes' ? fates.of(made).from : 0) : 0, findings)
  }
}

function checkNumbers(
  { job, grants, putBacks }: JobLife,
  most: number,
  finalAttempts: number | undefined,
  lost: ReadonlyMap<string, readonly Op<ClaimCall>[]>,
  findings: Findings,
): void {
  const byAttempt = [...grants].sort((a, b) => a.attempt - b.attempt || a.claim.end - b.claim.end)
  let before: Grant | undefined
  for (const grant of byAttempt) {
    if (grant.attempt > most)
      findings.violation('jobs: maxAttempts', `job ${job} was claimed for the ${grant.attempt}. time of ${most}`, grant)
    if (before?.attempt === grant.attempt) {
      const other = before
      const isBack = (at: number) => at >= other.claim.at && at <= grant.claim.end
      const handedBack =
        putBacks.some((op) => op.call.attempt === grant.attempt && isBack(op.at)) ||
        other.claim.process.closes.some((op) => op.call.stream === undefined && isBack(op.at))
      if (!handedBack) findings.violation('jobs: an attempt once', `attempt ${grant.attempt} of job ${job} was claimed twice`, other, grant)
    } else if (grant.attempt > (before?.attempt ?? 0) + 1) {
      const since = before?.claim.at ?? 0
      if (!isExplained(lost.get(grant.claim.call.queue), since, grant.claim.end)) {
        findings.violation(
          'jobs: no gaps',
          `job ${job} went from attempt ${before?.attempt ?? 0} to ${grant.attempt}, and no claim was lost`,
          before ?? 'no claim before',
          grant,
        )
      }
      findings.looked('jobs: gaps')
    }
    before = grant
  }
  if (!before || finalAttempts === undefined) return
  if (finalAttempts < before.attempt && putBacks.length === 0 && before.claim.process.closes.length === 0) {
    findings.violation('jobs: no gaps', `job ${job} was claimed ${before.attempt} times, and has ${finalAttempts} attempts`, before)
  }
  if (finalAttempts > before.attempt && !isExplained(lost.get(before.claim.call.queue), before.claim.at, Number.POSITIVE_INFINITY)) {
    findings.violation(
      'jobs: no gaps',
      `job ${job} has ${finalAttempts} attempts, was seen in ${before.attempt}, and no claim was lost`,
      before,
    )
  }
}

function isExplained(lost: readonly Op<ClaimCall>[] | undefined, since: number, until: number): boolean {
  return lost?.some((op) => op.at <= until && (op.outcome === 'none' || op.end + LATE_US >= since)) === true
}

function checkSettlements({ job, grants, settles, putBacks }: JobLife, fates: Fates, findings: Findings): void {
  const succeeded = settles.filter((op) => op.call.do !== 'jobHeartbeat' && fates.of(op).fate === 'yes')
  for (const [n, op] of succeeded.entries()) {
    findings.looked('jobs: settlements')
    const again = op.call.do !== 'jobNak' && grants.find(({ attempt }) => attempt > op.call.attempt)
    if (again)
      findings.violation(
        'jobs: settled, never again',
        `job ${job} was ended in attempt ${op.call.attempt}, and claimed again`,
        op,
        op.call.tx === undefined ? [] : fates.commitsOf(op.call.tx),
        again,
      )
    for (const other of succeeded.slice(0, n)) {
      const bothEnd = op.call.do !== 'jobNak' && other.call.do !== 'jobNak'
      const same = op.call.attempt === other.call.attempt && !putBacks.some(({ call }) => call.attempt === op.call.attempt)
      if (same || bothEnd) findings.violation('jobs: settled once', `job ${job} was settled twice`, other, op)
    }
  }
  if (grants.length < 2) return
  for (const op of settles) {
    if (!op.ok) continue
    findings.looked('jobs: fencing')
    const later = grants.find(({ attempt, claim }) => attempt > op.call.attempt && claim.end < op.at)
    if (later)
      findings.violation(
        'jobs: fencing',
        `${op.call.do} of attempt ${op.call.attempt} of job ${job} succeeded after it had been claimed again`,
        later,
        op,
      )
  }
}

function checkLeases(life: JobLife, enqueuedFrom: number, findings: Findings): void {
  const grants = [...life.grants].sort((a, b) => a.attempt - b.attempt || a.claim.end - b.claim.end)
  let since = enqueuedFrom
  for (const [n, grant] of grants.entries()) {
    since = Math.max(since, grant.claim.at)
    const next = grants[n + 1]
    if (!next) break
    findings.looked('jobs: leases')
    // Settlements name the attempt: which of several claims of one number they are of, nobody knows.
    const isRepeated = [grants[n - 1], next].some((other) => other?.attempt === grant.attempt)
    const free = isRepeated ? 0 : freeAfter(life, grant, since)
    if (next.claim.end < free - TOLERANCE_US) {
      const early = Math.round((free - next.claim.end) / MS)
      findings.violation(
        'jobs: leases',
        `job ${life.job} was claimed again at least ${early} ms too early`,
        grant,
        settlesOf(life, grant),
        next,
      )
    }
  }
}

/** When somebody else could claim it at the earliest. */
function freeAfter(life: JobLife, grant: Grant, since: number): number {
  const mine = settlesOf(life, grant)
  let at = since + grant.claim.call.ttlMs * MS
  const acked = Math.min(...mine.filter(({ call }) => call.do === 'jobAck' && call.tx !== undefined).map((op) => op.at))
  for (const op of mine) if (op.ok && op.call.do === 'jobHeartbeat' && op.end < acked) at = Math.max(at, op.at + op.call.ttlMs * MS)
  for (const op of mine) {
    if (op.call.do !== 'jobNak' || isRefusal(op)) continue
    if (op.ok) return Math.max(since, op.at + (op.call.delayMs ?? 0) * MS)
    at = Math.min(at, op.at)
  }
  for (const { call, at: backAt } of life.putBacks) if (call.attempt === grant.attempt) at = Math.min(at, backAt)
  for (const { call, at: closedAt } of grant.claim.process.closes)
    if (call.stream === undefined && closedAt >= grant.claim.at) at = Math.min(at, closedAt)
  return at
}

function settlesOf({ settles }: JobLife, { attempt }: Grant): Op<JobCall>[] {
  return settles.filter(({ call }) => call.attempt === attempt)
}

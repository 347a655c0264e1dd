/**
 * K5: leases exclude one another, and their fences grow.
 *
 * Assumes: a lease was granted between the call and its answer, and ends no earlier than its ttl after the call of the lease, or of a
 * heartbeat of it that succeeded; no later than its ttl after their answers, but for a heartbeat that was not answered, which may have
 * arrived at any time. It ends earlier by a release, whatever was answered, and
 * by the close of a bus of its process. Grants whose answers were lost make others wait and use up fences; neither is a fault.
 */

import type { Answers } from '../record.ts'
import { TOLERANCE_US } from './ack-wait.ts'
import { isRefusal } from './fates.ts'
import { type History, type LeaseCall, type LeaseUseCall, MS, type Op } from './history.ts'
import type { Findings } from './report.ts'

interface Held {
  readonly grant: Op<LeaseCall>
  readonly fence: number
  readonly uses: readonly Op<LeaseUseCall>[]
}

export function checkLeases(history: History, findings: Findings): void {
  const uses = Map.groupBy(history.leaseUses, ({ call }) => `${call.key} ${call.fence}`)
  const byKey = Map.groupBy(
    history.leases.filter(({ ok }) => ok),
    ({ call }) => call.key,
  )
  for (const [key, grants] of byKey) {
    // In the order of their calls, as they come.
    const held = grants.map((grant): Held => {
      const { fence } = grant.answer as Answers['lease']
      return { grant, fence, uses: uses.get(`${key} ${fence}`) ?? [] }
    })
    findings.looked('leases: grants', held.length)
    checkFences(key, held, findings)
    for (const [n, lease] of held.entries()) {
      checkExclusive(key, lease, held, n, findings)
      checkHeartbeats(key, lease, held, findings)
    }
  }
}

function checkFences(key: string, held: readonly Held[], findings: Findings): void {
  const seen = new Map<number, Held>()
  const byAnswer = [...held].sort((a, b) => a.grant.end - b.grant.end)
  let answered = 0
  let highest: Held | undefined
  for (const lease of held) {
    const other = seen.get(lease.fence)
    if (other) findings.violation('leases: fences grow', `the fence ${lease.fence} of ${key} was given twice`, other.grant, lease.grant)
    seen.set(lease.fence, lease)
    for (let before = byAnswer[answered]; before && before.grant.end < lease.grant.at; before = byAnswer[++answered]) {
      if (!highest || before.fence > highest.fence) highest = before
    }
    if (highest && highest.fence >= lease.fence) {
      findings.violation(
        'leases: fences grow',
        `${key} was granted with fence ${lease.fence} after ${highest.fence}`,
        highest.grant,
        lease.grant,
      )
    }
  }
}

function checkExclusive(key: string, lease: Held, held: readonly Held[], n: number, findings: Findings): void {
  const live = liveUntil(lease) - TOLERANCE_US
  for (let m = n + 1; m < held.length; m++) {
    const other = held[m] as Held
    if (other.grant.at > live) break
    if (other.grant.at < lease.grant.end || other.grant.end >= live) continue
    findings.violation(
      'leases: exclusive',
      `${key} was granted to another while it was held`,
      lease.grant,
      lease.uses.slice(-4),
      other.grant,
    )
    break
  }
}

function liveUntil({ grant, uses }: Held): number {
  let until = grant.at + grant.call.ttlMs * MS
  for (const use of uses) if (use.call.do === 'leaseHeartbeat' && use.ok) until = Math.max(until, use.at + use.call.ttlMs * MS)
  for (const use of uses) if (use.call.do === 'leaseRelease') until = Math.min(until, use.at)
  for (const { call, at } of grant.process.closes) if (call.stream === undefined && at >= grant.at) until = Math.min(until, at)
  return until
}

function checkHeartbeats(key: string, lease: Held, held: readonly Held[], findings: Findings): void {
  const { grant, fence, uses } = lease
  let runsOut = grant.end + grant.call.ttlMs * MS
  const taken = held.filter((other) => other.fence > fence)
  for (const use of uses) {
    if (use.call.do !== 'leaseHeartbeat') continue
    findings.looked('leases: heartbeats')
    if (use.ok) {
      const other = taken.find((one) => one.grant.end < use.at)
      if (other)
        findings.violation(
          'leases: heartbeat of a lost lease',
          `a heartbeat of ${key} succeeded after another had been granted it`,
          grant,
          other.grant,
          use,
        )
      if (use.at > runsOut + TOLERANCE_US)
        findings.violation(
          'leases: heartbeat of a lost lease',
          `a heartbeat of ${key} succeeded after the lease had run out`,
          grant,
          uses.slice(0, 8),
        )
    }
    if (!isRefusal(use)) runsOut = Math.max(runsOut, (use.ok ? use.end : Number.POSITIVE_INFINITY) + use.call.ttlMs * MS)
  }
}

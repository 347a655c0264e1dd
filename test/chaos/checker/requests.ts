/**
 * R1, R4: a request is handled at most once, not after its deadline, and gets its own reply.
 *
 * Assumes: a reply is `re:` and the id of the request it answers. The deadline is counted from the call; the server counts it from when
 * the request comes in with what is left of it then, which is later by its way there: hence the larger tolerance. A request on whose
 * way there something was done to its process or its wires may have been long under way; it is counted, and not judged.
 */

import type { Answers } from '../record.ts'
import { type Handling, type History, MS } from './history.ts'
import type { Findings } from './report.ts'

export const REQUEST_TOLERANCE_US = 250 * MS
/** A fault lasts no longer. */
const FAULT_US = 20_000 * MS

export function checkRequests(history: History, findings: Findings): void {
  const handled = new Map<string, Handling[]>()
  for (const { entry } of history.handlings) {
    const others = handled.get(entry.id)
    if (others) others.push(entry)
    else handled.set(entry.id, [entry])
  }
  const asked = new Set<string>()
  const faults = Map.groupBy(history.faults, ({ target }) => target)
  for (const op of history.requests) {
    const { id, timeoutMs } = op.call
    asked.add(id)
    findings.looked('requests')
    const mine = handled.get(id) ?? []
    if (mine.length > 1) findings.violation('requests: handled once', `request ${id} was handled ${mine.length} times`, op, mine)
    for (const one of mine) {
      const late = one.at - (op.at + timeoutMs * MS)
      if (late <= REQUEST_TOLERANCE_US) continue
      const { name, file } = op.process
      const mine = [...(faults.get(name) ?? []), ...(name === file ? [] : (faults.get(file) ?? []))]
      if (mine.some(({ at }) => at > op.at - FAULT_US && at < one.at)) findings.looked('requests: late, and held up')
      else
        findings.violation(
          'requests: not after the deadline',
          `request ${id} was begun ${Math.round(late / MS)} ms after its deadline`,
          op,
          one,
        )
    }
    if (!op.ok) continue
    const { reply } = op.answer as Answers['request']
    if (reply !== `re:${id}`) findings.violation('requests: own reply', `request ${id} was answered ${reply}`, op)
    if (mine.length === 0) findings.violation('requests: own reply', `request ${id} was answered, and nobody handled it`, op)
  }
  for (const [id, entries] of handled)
    if (!asked.has(id)) findings.violation('requests: own reply', `request ${id} was handled, and nobody made it`, entries)
}

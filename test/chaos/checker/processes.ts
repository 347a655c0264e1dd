/**
 * Every call settles, and nobody dies unasked.
 *
 * Assumes: before the runner kills a process it writes the fault `kill` with its name or the name of its file as the target; a process
 * that ends otherwise than it was told to is written down as the fault `died`.
 */

import type { History, Op } from './history.ts'
import type { Findings } from './report.ts'

export function checkProcesses(history: History, findings: Findings): void {
  const killed = new Set<string>()
  for (const fault of history.faults) {
    if (fault.fault === 'died') findings.violation('processes: none dies by itself', `${fault.target} died by itself`, fault)
    else if (fault.fault.startsWith('kill') && fault.target !== undefined) killed.add(fault.target)
  }
  const open = new Map<string, Op[]>()
  for (const op of history.unanswered) {
    const { name, file } = op.process
    if (killed.has(name) || killed.has(file)) continue
    open.set(name, [...(open.get(name) ?? []), op])
  }
  findings.looked('processes', history.processes.length)
  for (const [name, ops] of open) {
    findings.violation(
      'processes: every call settles',
      `${ops.length} calls of ${name}, which nobody killed, were never answered`,
      ops.slice(0, 5),
    )
  }
}

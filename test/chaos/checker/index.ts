/** Checks the record of a chaos run against the rules of the contract. Each rule's file says what it assumes. */

import { checkAckWaits } from './ack-wait.ts'
import { checkDeliveries } from './deliveries.ts'
import { Fates } from './fates.ts'
import { checkJobsClaimed } from './jobs-claimed.ts'
import { checkJobsEnded } from './jobs-ended.ts'
import { checkKeys } from './keys.ts'
import { checkLeases } from './leases.ts'
import { checkEnded } from './messages-ended.ts'
import { checkStored } from './messages-stored.ts'
import { checkOrder } from './order.ts'
import { checkProcesses } from './processes.ts'
import { read } from './read.ts'
import { Findings, type Report } from './report.ts'
import { checkRequests } from './requests.ts'

export { describe, type Report, type Violation } from './report.ts'

export async function check(directory: string): Promise<Report> {
  const history = await read(directory)
  const findings = new Findings()
  const fates = new Fates(history)
  checkStored(history, fates, findings)
  checkEnded(history, fates, findings)
  checkDeliveries(history, fates, findings)
  checkAckWaits(history, fates, findings)
  checkOrder(history, fates, findings)
  checkJobsEnded(history, fates, findings)
  checkJobsClaimed(history, fates, findings)
  checkLeases(history, findings)
  checkKeys(history, fates, findings)
  checkRequests(history, findings)
  checkProcesses(history, findings)
  const { checked, broken, violations } = findings
  return { directory, entries: history.entries, counts: history.counts, checked, broken, violations }
}

/**
 * P3, P6, P9: every message that is stored came to an end for every durable whose filter takes it: settled, or buried on
 * `<durable>.dlq`, exactly one of them, and nothing is left over.
 *
 * Assumes: the durables were there before the first publish or begin with all; the run was drained. What a settlement of unknown fate
 * may have ended counts as ended. `lease_lost` is of unknown fate when its answer took so long that the bus may have asked again.
 */

import { matches } from '../../../src/core/subjects.ts'
import type { FinalState } from '../record.ts'
import type { Fates } from './fates.ts'
import { getOrAdd, type History, type Pair, type StoredMessage } from './history.ts'
import { isDeadLetter } from './messages-stored.ts'
import type { Findings } from './report.ts'

type Durable = FinalState['durables'][number]

export function checkEnded(history: History, fates: Fates, findings: Findings): void {
  const letters = lettersOf(history)
  const stored = new Map(history.final.messages.map((message) => [message.seq, message]))
  for (const durable of history.final.durables) {
    const pairs = history.pairs.get(durable.name)
    const unsettled = new Set(durable.unsettled)
    for (const seq of unsettled)
      findings.violation(
        'messages: drained',
        `message ${seq} is left over for ${durable.name} after the end`,
        pairs?.get(seq)?.yields.slice(-3) ?? [],
      )
    const mine = letters.get(durable.name)
    const taken = new Map<string, boolean>()
    for (const message of history.final.messages) {
      if (!getOrAdd(taken, message.subject, () => matches(durable.filter, message.subject))) continue
      findings.looked('messages: ends')
      checkEnd(durable, message, pairs?.get(message.seq), mine?.get(message.seq) ?? [], unsettled.has(message.seq), fates, findings)
    }
    for (const [seq, found] of mine ?? []) {
      const message = stored.get(seq)
      if (!message || !matches(durable.filter, message.subject)) {
        findings.violation('messages: dead letters', `${durable.name} buried message ${seq}, which it never had`, found)
      }
    }
  }
}

/** By durable and the seq of the original. */
function lettersOf(history: History): Map<string, Map<number, StoredMessage[]>> {
  const letters = new Map<string, Map<number, StoredMessage[]>>()
  for (const message of history.final.messages) {
    const { subject, headers } = message
    if (!isDeadLetter(message) || headers.dlq_seq === undefined || !subject.endsWith('.dlq')) continue
    const durable = subject.slice(0, -'.dlq'.length)
    const mine = getOrAdd(letters, durable, () => new Map<number, StoredMessage[]>())
    const seq = Number(headers.dlq_seq)
    mine.set(seq, [...(mine.get(seq) ?? []), message])
  }
  return letters
}

function checkEnd(
  durable: Durable,
  message: StoredMessage,
  pair: Pair | undefined,
  letters: readonly StoredMessage[],
  isLeft: boolean,
  fates: Fates,
  findings: Findings,
): void {
  const ends = (pair?.settles ?? []).filter(({ call }) => call.do === 'ack' || call.do === 'term')
  const settled = ends.filter((op) => fates.of(op).fate === 'yes')
  const what = `message ${message.seq} (${message.id}) for ${durable.name}`
  const evidence = () => [message, ...(pair?.yields ?? []).slice(-3), ...(pair?.settles ?? []).slice(-4)]
  if (settled.length > 0 && isLeft)
    findings.violation('messages: settled, gone', `${what} was settled, and is left over`, settled, evidence())
  if (settled.length > 0 && letters.length > 0)
    findings.violation('messages: settled, not buried', `${what} was settled, and has a dead letter`, settled, letters)
  if (isLeft && letters.length > 0) findings.violation('messages: dead letters', `${what} is left over, and has a dead letter`, letters)
  if (letters.length > 0) checkLetters(durable, message, letters, what, findings)
  if (settled.length > 0 || letters.length > 0 || isLeft) return
  if (ends.some((op) => fates.of(op).fate === 'maybe')) {
    findings.looked('messages: ends that nobody knows')
    return
  }
  const never = pair === undefined || pair.yields.length === 0 ? 'was never delivered' : 'was never settled nor buried'
  findings.violation('messages: nothing lost', `${what} ${never}, and is not there any more`, evidence())
}

function checkLetters(durable: Durable, message: StoredMessage, letters: readonly StoredMessage[], what: string, findings: Findings): void {
  findings.looked('messages: dead letters')
  const fail = (text: string) => findings.violation('messages: dead letters', `${what}: ${text}`, message, letters)
  if (letters.length > 1) fail(`there are ${letters.length} dead letters`)
  if (durable.maxDeliver === null) fail('it was buried without a limit of deliveries')
  for (const { id, headers } of letters) {
    if (id !== message.id) fail('the dead letter has another payload')
    if (headers.dlq_subject !== message.subject) fail('the dead letter names another subject')
    if (headers.dlq_reason !== 'max_deliver_exceeded') fail(`the dead letter names the reason ${headers.dlq_reason}`)
    if (Number(headers.dlq_attempts) !== durable.maxDeliver)
      fail(`it was buried after ${headers.dlq_attempts} deliveries, not ${durable.maxDeliver}`)
    for (const [name, value] of Object.entries(message.headers))
      if (!name.startsWith('dlq_') && headers[name] !== value) fail(`the dead letter has lost the header ${name}`)
  }
}

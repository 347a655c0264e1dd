/**
 * What becomes of a message that its durable can do nothing with: it is published on `<durable>.dlq`, as the bus itself does at the last delivery
 * (P6), and then ended for its durable.
 */

import { type Headers, isBusError, type Msg, type Pubsub } from '../core/index.ts'
import { oneLine } from './error-text.ts'

/** What is left of the reason where there is too little room. */
const SHORT_REASON = 200

/**
 * A letter gets no letter: it is where it belongs. One that its own durable can do nothing with either (a durable on `>` gets its own) would otherwise be
 * followed by another without end, and those of two such durables by one another's.
 */
export function isDeadLetter({ subject, headers }: Pick<Msg, 'subject' | 'headers'>): boolean {
  return subject.endsWith('.dlq') && Object.hasOwn(headers, 'dlq_reason')
}

/**
 * Stores the letter once, however often it is tried within the duplicate window (P12): it is named by its kind, durable and message.
 * @param kind what its reason begins with: `invalid_payload`
 * @throws whatever keeps it from being published
 */
export async function publishLetter(
  pubsub: Pick<Pubsub, 'publish'>,
  msg: Msg<never>,
  durable: string,
  kind: string,
  reason: string,
): Promise<void> {
  const letters = lettersOf(msg, `${kind}: ${reason}`)
  const msgId = `${kind}:${durable}:${msg.seq}`
  for (const [n, { payload, headers }] of letters.entries()) {
    try {
      await pubsub.publish(`${durable}.dlq`, payload, { headers, msgId })
      return
    } catch (error) {
      // Of its arguments only the headers can be wrong: too many with those that were added.
      const tooLarge = isBusError(error, 'payload_too_large') || isBusError(error, 'invalid_argument')
      if (!tooLarge || n === letters.length - 1) throw error
    }
  }
}

interface Letter {
  readonly payload: Uint8Array
  readonly headers: Headers
}

/** From all of it to less and less, ending with one without a payload. */
function lettersOf(msg: Msg<never>, reason: string): Letter[] {
  const { payload } = msg
  const added = { dlq_reason: reason, dlq_subject: msg.subject, dlq_seq: String(msg.seq), dlq_attempts: String(msg.attempt) }
  const bare = {
    ...added,
    dlq_reason: oneLine(reason, SHORT_REASON),
    dlq_headers_dropped: String(Object.keys(msg.headers).length),
  }
  const cut = { ...bare, dlq_payload_bytes: String(payload.byteLength) }
  // Together as large as the message was, which the bus took.
  const room = Math.max(0, payload.byteLength + sizeOf(msg.headers) - sizeOf(cut))
  return [
    { payload, headers: { ...msg.headers, ...added } },
    { payload, headers: bare },
    { payload: payload.subarray(0, room), headers: cut },
    { payload: payload.subarray(0, 0), headers: cut },
  ]
}

function sizeOf(headers: Headers): number {
  return Object.entries(headers).reduce((sum, [name, text]) => sum + name.length + Buffer.byteLength(text), 0)
}

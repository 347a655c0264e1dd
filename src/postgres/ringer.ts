/**
 * Wake-ups after commit (P14; docs/adr/0003-wake-ups.md). A NOTIFY inside a business transaction takes a lock that every
 * notifying commit of the cluster waits for until it is durable. So nothing is notified there:
 *
 * - After a commit of the bus itself the processes are told in a transaction that does nothing but notify, and what is
 *   rung within a few milliseconds is told together.
 * - For a call in a caller's transaction the process that made the call asks the server, every few milliseconds, whether
 *   that transaction has ended, and rings then.
 *
 * While the notification queue of the server is full, what was rung is kept and rung again. A ring that is lost (the process
 * dies, the server is away) costs its listeners one poll interval.
 */

import { isBusError } from '../core/index.ts'
import type { Bell, Topic } from '../runtime/bell.ts'
import type { Database } from './database.ts'
import { isNotifyQueueFull } from './errors.ts'

const GAP_MS = 5
const QUEUE_FULL_GAP_MS = 500
/** Beyond this many the kinds stand for the names. */
const MOST_KEPT = 1_000
const FIRST_LOOK_MS = 2
const LATEST_LOOK_MS = 20
/** A transaction that is open so long (a forgotten prepared one) is left to the poll. */
const FORGET_MS = 10 * 60 * 1_000
/** pg_notify takes 7999 bytes. */
const MAX_PAYLOAD_BYTES = 7_500

interface Notice {
  /** The process that rang: it has woken its own waiters already. */
  readonly from: string
  readonly topics: readonly string[]
}

const NOTIFY = 'select pg_notify($1, $2)'
// In progress until other snapshots see it end: what is rung then is found.
const ENDED = `
  select x.tx::text as tx, pg_xact_status(x.tx) as status
  from unnest($1::text::xid8[]) as x(tx)
  where pg_xact_status(x.tx) is distinct from 'in progress'`

interface OpenTransaction {
  readonly topics: Map<string, Topic>
  readonly since: number
}

export class Ringer {
  readonly #db: Database
  readonly #bell: Bell
  readonly channel: string
  readonly #instance: string
  readonly #waiting = new Set<string>()
  readonly #transactions = new Map<string, OpenTransaction>()
  #flushing: Promise<void> | undefined
  #endGap: (() => void) | undefined
  #looking = false
  #lookMs = FIRST_LOOK_MS
  #wakeLook: (() => void) | undefined
  #closed = false

  constructor(db: Database, bell: Bell, channel: string, instance: string) {
    this.#db = db
    this.#bell = bell
    this.channel = channel
    this.#instance = instance
  }

  /** What is committed. */
  ring(topics: readonly Topic[]): void {
    this.#bell.ring(topics)
    if (this.#closed) return
    for (const { kind, name } of topics) this.#waiting.add(`${kind}:${name}`)
    this.#flushing ??= this.#flush()
  }

  /** The text of a notification, for a statement that sends it along. */
  notice(topics: readonly Topic[]): string {
    return notice(
      this.#instance,
      topics.map(({ kind, name }) => `${kind}:${name}`),
    )
  }

  /** What is in a caller's transaction. @param tx its xid, as text */
  afterCommit(tx: string, topics: readonly Topic[]): void {
    if (this.#closed) return
    const open = this.#transactions.get(tx) ?? { topics: new Map<string, Topic>(), since: Date.now() }
    for (const topic of topics) open.topics.set(`${topic.kind}:${topic.name}`, topic)
    this.#transactions.set(tx, open)
    this.#lookMs = FIRST_LOOK_MS
    this.#wakeLook?.()
    if (!this.#looking) {
      this.#looking = true
      void this.#look()
    }
  }

  /** What another process rang, or ourselves. */
  heard(payload: string): void {
    const notice = parse(payload)
    if (!notice || notice.from === this.#instance) return
    this.#bell.ring(
      notice.topics.flatMap((text): Topic[] => {
        const colon = text.indexOf(':')
        return [{ kind: text.slice(0, colon) as Topic['kind'], name: text.slice(colon + 1) }]
      }),
    )
  }

  /** What was rung before goes out first. */
  async close(): Promise<void> {
    this.#closed = true
    this.#wakeLook?.()
    this.#endGap?.()
    await this.#flushing
  }

  async #flush(): Promise<void> {
    // What the same tick rings goes along.
    await Promise.resolve()
    while (this.#waiting.size > 0) {
      const topics = [...this.#waiting]
      this.#waiting.clear()
      let gapMs = GAP_MS
      try {
        await this.#db.query(NOTIFY, [this.channel, notice(this.#instance, topics)], 'notify')
      } catch (error) {
        // Of anything else the listeners hear themselves, and look, or they poll.
        if (!this.#closed && isNotifyQueueFull((error as Error).cause)) {
          for (const topic of topics.length > MOST_KEPT ? kindsOf(topics) : topics) this.#waiting.add(topic)
          gapMs = QUEUE_FULL_GAP_MS
        }
      }
      if (this.#closed) continue
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, gapMs)
        this.#endGap = () => {
          clearTimeout(timer)
          resolve()
        }
      })
    }
    this.#flushing = undefined
  }

  async #look(): Promise<void> {
    while (this.#transactions.size > 0 && !this.#closed) {
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, this.#lookMs)
        this.#wakeLook = () => {
          clearTimeout(timer)
          setTimeout(resolve, FIRST_LOOK_MS)
        }
      })
      this.#wakeLook = undefined
      this.#lookMs = Math.min(LATEST_LOOK_MS, this.#lookMs * 1.5)
      if (this.#closed) return
      for (const [tx, { since }] of this.#transactions) if (Date.now() - since > FORGET_MS) this.#transactions.delete(tx)
      const open = [...this.#transactions.keys()]
      if (open.length === 0) break
      try {
        const ended = await this.#db.query<{ tx: string; status: string }>(ENDED, [`{${open.join(',')}}`], 'look')
        for (const { tx, status } of ended) {
          const topics = this.#transactions.get(tx)?.topics.values() ?? []
          this.#transactions.delete(tx)
          if (status !== 'aborted') this.ring([...topics])
        }
      } catch (error) {
        // An xid that the server does not know is another cluster's. Otherwise it is away: the next look tells.
        if (isBusError(error, 'invalid_argument')) this.#transactions.clear()
        this.#lookMs = LATEST_LOOK_MS
      }
    }
    this.#looking = false
  }
}

function notice(from: string, topics: readonly string[]): string {
  const text = JSON.stringify({ from, topics } satisfies Notice)
  if (Buffer.byteLength(text) <= MAX_PAYLOAD_BYTES) return text
  return JSON.stringify({ from, topics: kindsOf(topics) } satisfies Notice)
}

function kindsOf(topics: readonly string[]): string[] {
  return [...new Set(topics.map((topic) => `${topic.slice(0, topic.indexOf(':'))}:*`))]
}

/** Anybody may notify on the channel: what is not ours is passed over. */
function parse(payload: string): Notice | undefined {
  try {
    const value = JSON.parse(payload) as Partial<Notice>
    const ours = typeof value.from === 'string' && Array.isArray(value.topics) && value.topics.every((topic) => typeof topic === 'string')
    return ours ? (value as Notice) : undefined
  } catch {
    return undefined
  }
}

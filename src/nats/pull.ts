/** One pull request to a consumer, and what came of it. */

import { createInbox, type Msg } from '@nats-io/transport-node'
import { ANSWER_WITHIN_MS, type Context } from './context.ts'
import { mapped } from './errors.ts'
import { headersOf } from './wire.ts'

export interface PullOptions {
  readonly batch: number
  /** Wait so long for the first message; 0: take only what is there. */
  readonly waitMs: number
  readonly signal: AbortSignal
  /** How long what is large may be on its way. @default 3_500 */
  readonly transitMs?: number
}

export interface Pulled {
  readonly messages: readonly Msg[]
  /**
   * `answered`: the server said that there is no more, or gave all that was asked for. `silent`: it said nothing, as it does when there is no such
   * consumer, or nobody leads it. `ended`: the signal, a reconnect, or the consumer was deleted.
   */
  readonly how: 'answered' | 'silent' | 'ended'
}

/** How long a server may take to say that there is nothing. */
const SILENCE_MS = 1_500
/** A payload of 8 MiB over a link of 2 Mbit/s. */
export const LONG_TRANSIT_MS = 40_000
/** Who waits is told so often that he still does: a leader that died says nothing. */
const HEARTBEAT_MS = 2_000
/** What the server says instead of a message. */
const HEARTBEAT = 100
const GONE = 409
const NO_RESPONDERS = 503
/** What nobody leads is not asked again at once. */
const NOBODY_MS = 100
const NAK = '-NAK'

/** @throws connection: it was closed for good */
export function pull(context: Context, stream: string, consumer: string, options: PullOptions): Promise<Pulled> {
  return mapped(() => ask(context, stream, consumer, options))
}

function ask(context: Context, stream: string, consumer: string, options: PullOptions): Promise<Pulled> {
  const { nc, clock } = context
  const { batch, waitMs, signal, transitMs = ANSWER_WITHIN_MS - SILENCE_MS } = options
  return new Promise((resolve) => {
    const messages: Msg[] = []
    let over = false
    const local = new AbortController()
    const inbox = createInbox()
    const subscription = nc.subscribe(inbox, {
      callback: (error, msg) => {
        if (error) return finish('ended')
        const code = msg.data.length === 0 ? (headersOf(msg)?.code ?? 0) : 0
        if (code === HEARTBEAT) return watch(2 * HEARTBEAT_MS)
        if (code === NO_RESPONDERS) return watch(NOBODY_MS)
        if (code > 0) return finish(code === GONE ? 'ended' : 'answered')
        // It came when nobody waited any more: somebody else gets it.
        if (over) return void msg.respond(NAK)
        messages.push(msg)
        if (messages.length === batch) finish('answered')
      },
    })
    const finish = (how: Pulled['how']) => {
      if (over) return
      over = true
      cancel()
      local.abort()
      signal.removeEventListener('abort', onAbort)
      // Draining takes what is already on its way to us, and tells the server that nobody waits.
      if (messages.length < batch && how !== 'answered') void subscription.drain().catch(() => {})
      else subscription.unsubscribe()
      resolve({ messages, how })
    }
    const onAbort = () => finish('ended')
    let cancel = () => {}
    let heard = 0
    const watch = (ms: number) => {
      cancel()
      heard++
      if (!over) cancel = clock.setTimer(listen, ms, true)
    }
    // What is large may be on its way, and would be given back when it is here: what the server answers now comes after it.
    const listen = () => {
      cancel = clock.setTimer(() => finish('silent'), transitMs, true)
      const before = heard
      nc.flush().then(
        () => heard === before && finish('silent'),
        () => finish('ended'),
      )
    }
    const beats = waitMs >= 2 * HEARTBEAT_MS
    watch(SILENCE_MS + (beats ? HEARTBEAT_MS : waitMs))
    if (signal.aborted) return finish('ended')
    signal.addEventListener('abort', onAbort, { once: true })
    context.onReconnect(onAbort, local.signal)
    if (over) return
    const beating = beats ? { idle_heartbeat: HEARTBEAT_MS * 1e6 } : {}
    const request = waitMs > 0 ? { batch, expires: waitMs * 1e6, ...beating } : { batch, no_wait: true }
    try {
      nc.publish(`$JS.API.CONSUMER.MSG.NEXT.${stream}.${consumer}`, JSON.stringify(request), { reply: inbox })
    } catch {
      finish('ended')
    }
  })
}

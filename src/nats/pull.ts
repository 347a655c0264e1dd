/** One pull request to a consumer, and what came of it. */

import { createInbox, type Msg } from '@nats-io/transport-node'
import type { Context } from './context.ts'
import { mapped } from './errors.ts'

export interface PullOptions {
  readonly batch: number
  /** Wait so long for the first message; 0: take only what is there. */
  readonly waitMs: number
  readonly signal: AbortSignal
}

export interface Pulled {
  readonly messages: readonly Msg[]
  /**
   * `answered`: the server said that there is no more, or gave all that was asked for. `silent`: it said nothing, as it does when there is no such
   * consumer. `ended`: the signal, a reconnect, or the consumer was deleted.
   */
  readonly how: 'answered' | 'silent' | 'ended'
}

/** How long a server may take to say that there is nothing. */
const SILENCE_MS = 1_500
const NAK = '-NAK'

/** @throws connection: it was closed for good */
export function pull(context: Context, stream: string, consumer: string, options: PullOptions): Promise<Pulled> {
  return mapped(() => ask(context, stream, consumer, options))
}

function ask(context: Context, stream: string, consumer: string, options: PullOptions): Promise<Pulled> {
  const { nc, clock } = context
  const { batch, waitMs, signal } = options
  return new Promise((resolve) => {
    const messages: Msg[] = []
    let over = false
    const local = new AbortController()
    const inbox = createInbox()
    const subscription = nc.subscribe(inbox, {
      callback: (error, msg) => {
        if (error) return finish('ended')
        if (msg.data.length === 0 && msg.headers !== undefined && msg.headers.code > 0)
          return finish(msg.headers.code === 409 ? 'ended' : 'answered')
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
    const cancel = clock.setTimer(() => finish('silent'), waitMs + SILENCE_MS, true)
    if (signal.aborted) return finish('ended')
    signal.addEventListener('abort', onAbort, { once: true })
    context.onReconnect(onAbort, local.signal)
    if (over) return
    const request = waitMs > 0 ? { batch, expires: waitMs * 1e6 } : { batch, no_wait: true }
    try {
      nc.publish(`$JS.API.CONSUMER.MSG.NEXT.${stream}.${consumer}`, JSON.stringify(request), { reply: inbox })
    } catch {
      finish('ended')
    }
  })
}

/**
 * A message in the hands of a member. JetStream knows one ack wait per consumer; each member has its own. So while the
 * process lives it makes the difference: it tells the server "in progress" where its own ack wait is the longer one, and
 * hands back at its end where it is the shorter one. After the death of the process the consumer's counts.
 *
 * JetStream does not fence: a settlement of an older delivery settles the newer one. So a settlement is refused here once
 * the ack wait is over by our own monotonic clock (`supports.fencing` is `local`). Counted from the arrival: a process that
 * stood still before it read the message knows nothing of that.
 */

import type { Msg } from '@nats-io/transport-node'
import { BusError, type Headers } from '../core/index.ts'
import { consumerInfo } from './consumers.ts'
import { ANSWER_WITHIN_MS, type Context } from './context.ts'
import { isNoResponders } from './errors.ts'

/** `$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<timestamp>.<pending>`, since 2.9 with two tokens more in front. */
export function infoOf(msg: Msg): {
  readonly stream: string
  readonly consumer: string
  readonly deliveries: number
  readonly seq: number
  readonly consumerSeq: number
  readonly time: number
  readonly pending: number
} {
  const tokens = (msg.reply ?? '').split('.')
  const from = tokens.length >= 11 ? 6 : 4
  const at = (n: number) => Number(tokens[from + n])
  const [stream = '', consumer = ''] = tokens.slice(from - 2, from)
  return {
    stream,
    consumer,
    deliveries: at(0),
    seq: at(1),
    consumerSeq: at(2),
    time: Number(tokens[from + 3]?.slice(0, -6)),
    pending: at(4),
  }
}

/** So long it waits before a settlement that nobody heard is sent again. */
const UNHEARD_MS = [50, 200, 500]

export interface HeldDelivery {
  readonly subject: string
  readonly payload: Uint8Array
  readonly headers: Headers
  readonly seq: number
  readonly attempt: number
  readonly publishedAt: Date
  readonly hold: Hold
}

export class Hold {
  readonly #context: Context
  readonly msg: Msg
  readonly #serverWaitMs: number
  #deadline = 0
  #cancel: (() => void) | undefined
  #over = false

  /** @param serverWaitMs the ack wait of the consumer */
  constructor(context: Context, msg: Msg, serverWaitMs: number, ackWaitMs: number) {
    this.#context = context
    this.msg = msg
    this.#serverWaitMs = serverWaitMs
    this.#watch(ackWaitMs)
  }

  get isOver(): boolean {
    return this.#over || this.#context.clock.now() >= this.#deadline
  }

  /** @returns false when it is not ours any more, or the consumer is gone @throws unavailable while nobody leads it */
  async settle(verb: string): Promise<boolean> {
    if (this.isOver) return false
    const done = (await this.#send(verb)) || (await this.#sendAgain(verb))
    this.end()
    return done
  }

  /** Where something else than the ack wait says whose it is. */
  async settleAnyway(verb: string): Promise<void> {
    this.end()
    await this.#send(verb)
  }

  async extend(ackWaitMs: number): Promise<boolean> {
    if (this.isOver) return false
    if (!(await this.#send('+WPI')) && !(await this.#sendAgain('+WPI'))) return false
    this.#watch(ackWaitMs)
    return true
  }

  /** It is to last so long from now on, by nobody's word but ours. */
  last(ms: number): void {
    this.#watch(ms)
  }

  /** Likewise, and the server is told without waiting for its answer. */
  prolong(ms: number): void {
    if (this.#over) return
    this.#say('+WPI')
    this.#watch(ms)
  }

  /** Without waiting for an answer. */
  handBack(delayMs = 0): void {
    this.end()
    this.#say(nakVerb(delayMs))
  }

  /** Nothing more is told to the server. */
  end(): void {
    this.#over = true
    this.#cancel?.()
  }

  /** Nobody heard it: the consumer is gone, or somebody else is just about to lead it. */
  async #sendAgain(verb: string): Promise<boolean> {
    const { stream, consumer } = infoOf(this.msg)
    for (const pauseMs of UNHEARD_MS) {
      if (!(await consumerInfo(this.#context, stream, consumer))) return false
      await new Promise<void>((resolve) => this.#context.clock.setTimer(resolve, pauseMs))
      if (this.isOver) return false
      if (await this.#send(verb)) return true
    }
    throw new BusError('unavailable', `JetStream: nobody takes settlements of consumer "${consumer}" at the moment`)
  }

  async #send(verb: string): Promise<boolean> {
    return this.#context.ask(async () => {
      try {
        await this.#context.nc.request(this.msg.reply as string, verb, { timeout: ANSWER_WITHIN_MS })
        return true
      } catch (error) {
        if (isNoResponders(error)) return false
        throw error
      }
    })
  }

  #watch(ackWaitMs: number): void {
    const { clock } = this.#context
    this.#deadline = clock.now() + ackWaitMs
    this.#schedule(clock.now())
  }

  #schedule(toldAt: number): void {
    this.#cancel?.()
    const { clock } = this.#context
    const left = this.#deadline - clock.now()
    // The server's own timer does it.
    if (Math.abs(this.#deadline - toldAt - this.#serverWaitMs) < 1) return
    if (left <= this.#serverWaitMs && this.#deadline < toldAt + this.#serverWaitMs) {
      this.#cancel = clock.setTimer(() => this.handBack(), left, true)
      return
    }
    const next = Math.min(this.#serverWaitMs / 3, Math.max(1, left - this.#serverWaitMs))
    this.#cancel = clock.setTimer(() => this.#tell('+WPI'), next, true)
  }

  #tell(verb: string): void {
    if (this.#over) return
    this.#say(verb)
    this.#schedule(this.#context.clock.now())
  }

  #say(verb: string): void {
    try {
      this.msg.respond(verb)
    } catch {
      // The connection is gone for good; the consumer's ack wait ends it.
    }
  }
}

/** The verb of a nak. */
export function nakVerb(delayMs: number): string {
  return delayMs > 0 ? `-NAK ${JSON.stringify({ delay: delayMs * 1e6 })}` : '-NAK'
}

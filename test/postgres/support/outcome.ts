/** What a settlement came to, and what a stream or a queue has to give: the words in which the interleavings are written. */

import { BusError, type Msg, type MsgStream, type PostgresTx } from '../../../src/index.ts'

/** `ok`, or the code of the BusError it was rejected with. Any other rejection is passed on. */
export async function outcome(call: Promise<unknown>): Promise<string> {
  try {
    await call
    return 'ok'
  } catch (error) {
    if (error instanceof BusError) return error.code
    throw error
  }
}

/**
 * The messages of a stream, taken one at a time. A `take` that found nothing in time leaves its request with the stream, as a
 * consumer would; the next `take` gets that one's answer.
 */
export class Taker {
  readonly #messages: AsyncIterator<Msg<PostgresTx>>
  #asked: Promise<IteratorResult<Msg<PostgresTx>>> | undefined

  constructor(stream: MsgStream<PostgresTx>) {
    this.#messages = stream[Symbol.asyncIterator]()
  }

  /** @returns `null` when there was none within `withinMs`, or the stream ended */
  async take(withinMs = 10_000): Promise<Msg<PostgresTx> | null> {
    this.#asked ??= this.#messages.next()
    const tooLate = Promise.withResolvers<null>()
    const timer = setTimeout(() => tooLate.resolve(null), withinMs)
    const result = await Promise.race([this.#asked, tooLate.promise])
    clearTimeout(timer)
    if (result === null) return null
    this.#asked = undefined
    return result.done ? null : result.value
  }

  /** @throws when there was none within `withinMs` */
  async expect(withinMs?: number): Promise<Msg<PostgresTx>> {
    const message = await this.take(withinMs)
    if (!message) throw new Error('no message came')
    return message
  }
}

export function text(bytes: Uint8Array): string {
  return new TextDecoder().decode(bytes)
}

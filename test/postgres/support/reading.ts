/** Reading a stream up to a known point, so that no test has to wait to see that nothing more comes. */

import type { Msg, MsgStream, PostgresTx } from '../../../src/index.ts'

export type PgMsg = Msg<PostgresTx>

export const text = (message: PgMsg): string => Buffer.from(message.payload).toString()

/** The next message, unsettled. @throws when none comes within `withinMs`, or the stream ends */
export async function next(stream: MsgStream<PostgresTx>, withinMs = 10_000, what = 'a message'): Promise<PgMsg> {
  const { promise, reject } = Promise.withResolvers<never>()
  const timer = setTimeout(() => reject(new Error(`${what} did not come within ${withinMs} ms`)), withinMs)
  try {
    const result = await Promise.race([stream[Symbol.asyncIterator]().next(), promise])
    if (result.done) throw new Error(`the stream ended before ${what} came`)
    return result.value
  } finally {
    clearTimeout(timer)
  }
}

/** Reads and acks so many, and answers their texts in the order in which they came. */
export async function take(stream: MsgStream<PostgresTx>, count: number, withinMs = 10_000): Promise<string[]> {
  const deadline = performance.now() + withinMs
  const texts: string[] = []
  const acks: Promise<void>[] = []
  while (texts.length < count) {
    const seen = texts.length <= 10 ? texts.join(', ') : `${texts.length} messages`
    const message = await next(
      stream,
      Math.max(1, deadline - performance.now()),
      `message ${texts.length + 1} of ${count} (so far: ${seen})`,
    )
    texts.push(text(message))
    acks.push(message.ack())
  }
  await Promise.all(acks)
  return texts
}

/**
 * Reads and acks up to and with the message `last`, and answers the texts before it. Whatever was committed before `last`
 * was published is handed out before it (P8): what is missing in the answer was not there.
 */
export async function takeUntil(stream: MsgStream<PostgresTx>, last: string, withinMs = 10_000): Promise<string[]> {
  const deadline = performance.now() + withinMs
  const texts: string[] = []
  for (;;) {
    const [got] = await take(stream, 1, Math.max(1, deadline - performance.now())).catch((error: unknown) => {
      throw new Error(`"${last}" did not come; before it came: ${texts.slice(0, 20).join(', ') || 'nothing'}`, { cause: error })
    })
    if (got === last) return texts
    texts.push(got as string)
  }
}

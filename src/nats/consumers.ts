/**
 * What is asked of a consumer besides its messages. A cluster says nothing of one that it is just making or that nobody leads yet, neither to who
 * asks nor to who makes it: it is asked again within the time that an answer may take.
 */

import type { ConsumerConfig, ConsumerInfo } from '@nats-io/jetstream'
import type { Context } from './context.ts'
import { isNotThere, isTimeout } from './errors.ts'

/** Each of a second: what the quick manager waits. */
const TRIES = 5

/** @returns `null` when there is none */
export function consumerInfo(context: Context, stream: string, name: string): Promise<ConsumerInfo | null> {
  return context.ask(async () => {
    for (let tries = 1; ; tries++) {
      try {
        return await context.quick.consumers.info(stream, name)
      } catch (error) {
        if (isNotThere(error)) return null
        if (!isTimeout(error) || tries === TRIES) throw error
      }
    }
  })
}

/** @throws unavailable, connection */
export async function makeConsumer(
  context: Context,
  stream: string,
  config: Partial<ConsumerConfig> & { durable_name: string },
): Promise<void> {
  await context.ask(async () => {
    try {
      await context.jsm.consumers.add(stream, config)
    } catch (error) {
      if (!isTimeout(error) || !(await consumerInfo(context, stream, config.durable_name))) throw error
    }
  })
}

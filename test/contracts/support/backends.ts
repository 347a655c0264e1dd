/** The backends on which the typed contracts are tested: all of them by the same tests. */

import { afterAll, describe } from 'vitest'
import { type Bus, type Msg, PostgresBus, type PostgresTx } from '../../../src/index.ts'
import { MemoryBus, MemoryStore } from '../../../src/memory/index.ts'
import { databaseUrl, freshSchema } from '../../support/server.ts'

export interface Backend {
  readonly name: string
  /** A bus of its own on what all of this file share. */
  connect(options?: { readonly maxPayloadBytes?: number }): Promise<Bus<PostgresTx> | Bus<never>>
}

/** Runs the same tests on each backend; every bus is closed at the end. */
export function onEachBackend(define: (backend: Backend) => void): void {
  const store = new MemoryStore()
  const schema = freshSchema()
  const open: Bus<PostgresTx>[] = []
  const kept = <B>(bus: B): B => {
    open.push(bus as Bus<PostgresTx>)
    return bus
  }
  const backends: readonly Backend[] = [
    { name: 'memory', connect: async (options) => kept(MemoryBus.create({ store, ...options })) },
    {
      name: 'postgres',
      connect: async (options) => kept(await PostgresBus.connect({ connectionString: databaseUrl(), schema, ...options })),
    },
  ]
  afterAll(() => Promise.all(open.map((bus) => bus.close())))
  for (const backend of backends) describe(backend.name, () => define(backend))
}

let names = 0

/** A name that no other test of this file uses: a subject's first token, a durable, a queue, a bucket. */
export function fresh(): string {
  return `t${process.pid}-${++names}`
}

/** The next messages, acked. */
export async function take<M extends Pick<Msg, 'ack'>>(stream: AsyncIterable<M>, count: number): Promise<M[]> {
  const taken: M[] = []
  if (count === 0) return taken
  for await (const msg of stream) {
    await msg.ack()
    if (taken.push(msg) === count) break
  }
  return taken
}

/** All that is stored there up to now, acked, by a durable of its own. */
export async function stored(bus: Bus<never>, subject: string): Promise<Msg[]> {
  const end = `${fresh()}.end`
  const durable = fresh()
  // Published last, on a subject of its own, and read by the same durable: whatever was stored before comes before (P8).
  await bus.pubsub.publish(end, '')
  const found: Msg[] = []
  const stream = await bus.pubsub.subscribe('>', durable)
  for await (const msg of stream) {
    await msg.ack()
    if (msg.subject === end) break
    if (msg.subject === subject) found.push(msg)
  }
  await stream.close()
  await bus.pubsub.deleteDurable(durable)
  return found
}

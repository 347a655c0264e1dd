/**
 * A process that holds jobs, messages and leases on command: each line of its stdin is a call, each line of its stdout the
 * answer. It is there to be killed and stopped.
 */

import { createInterface } from 'node:readline'
import { type ClaimedJob, type Lease, type Msg, type MsgStream, PostgresBus, type PostgresTx } from '../../../src/index.ts'
import { outcome, Taker } from './outcome.ts'

export type Command =
  | { readonly do: 'claim'; readonly queue: string; readonly ttlMs: number; readonly waitMs?: number }
  | { readonly do: 'ack' | 'heartbeat' }
  | { readonly do: 'subscribe'; readonly durable: string; readonly ackWaitMs: number }
  | { readonly do: 'take'; readonly withinMs: number }
  | { readonly do: 'ack-message' }
  | { readonly do: 'lease'; readonly key: string; readonly ttlMs: number; readonly waitMs?: number }
  | { readonly do: 'heartbeat-lease' | 'release' }

const [connectionString, schema] = process.argv.slice(2) as [string, string]
const bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
let job: ClaimedJob<PostgresTx> | null = null
let stream: MsgStream<PostgresTx>
let taker: Taker
let message: Msg<PostgresTx> | null = null
let lease: Lease

async function answer(command: Command): Promise<object> {
  switch (command.do) {
    case 'claim':
      job = await bus.jobs.claim(command.queue, `child-${process.pid}`, command.ttlMs, { waitMs: command.waitMs ?? 0 })
      return { job: job && { id: job.id, attempt: job.attempt, fence: job.lease.fence } }
    case 'ack':
      return { outcome: await outcome(job!.ack()) }
    case 'heartbeat':
      return { outcome: await outcome(job!.heartbeat()), aborted: job!.lease.signal.aborted }
    case 'subscribe':
      stream = await bus.pubsub.subscribe(command.durable, command.durable, { ackWaitMs: command.ackWaitMs })
      taker = new Taker(stream)
      return {}
    case 'take':
      message = await taker.take(command.withinMs)
      return { message: message && { seq: message.seq, attempt: message.attempt } }
    case 'ack-message':
      return { outcome: await outcome(message!.ack()) }
    case 'lease': {
      const call = bus.kv.lease('leases', command.key, command.ttlMs, { waitMs: command.waitMs ?? 0 }).then((granted) => {
        lease = granted
      })
      const granted = await outcome(call)
      return { outcome: granted, fence: granted === 'ok' ? lease.fence : null }
    }
    case 'heartbeat-lease':
      return { outcome: await outcome(lease.heartbeat()), aborted: lease.signal.aborted }
    case 'release':
      return { outcome: await outcome(lease.release()) }
  }
}

process.stdout.write('{"ready":true}\n')
for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(`${JSON.stringify({ answer: await answer(JSON.parse(line) as Command) })}\n`)
}
await bus.close()

/** A bridge in a process of its own, to be stopped and killed; each line of its stdin asks for its stats: node bridge-child.ts <setup as JSON> */

import { createInterface } from 'node:readline'
import { Bridge, PostgresBus } from '../../../src/index.ts'
import { NatsBus } from '../../../src/nats/index.ts'

export interface Setup {
  readonly connectionString: string
  readonly schema: string
  readonly servers: string
  readonly prefix: string
  readonly from: 'postgres' | 'nats'
  readonly subject: string
  readonly durable: string
  readonly ackWaitMs: number
}

const { connectionString, schema, servers, prefix, from, subject, durable, ackWaitMs } = JSON.parse(process.argv[2]!) as Setup
const postgres = await PostgresBus.connect({ connectionString, schema, maintenance: false, migrate: false })
const nats = await NatsBus.connect({ servers, prefix })
const [source, target] = from === 'postgres' ? [postgres, nats] : [nats, postgres]
const bridge = new Bridge(source, target, subject, { durable, ackWaitMs, onError: () => {} })
createInterface({ input: process.stdin }).on('line', () => process.stdout.write(`${JSON.stringify(bridge.stats)}\n`))

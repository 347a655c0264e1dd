import { randomBytes } from 'node:crypto'
import { afterAll, describe, test } from 'vitest'
import { NatsBus } from '../../src/nats/index.ts'
import { conformance } from '../../src/testing/conformance/index.ts'
import { natsServer, whyNoNats } from '../support/nats-server.ts'

const missing = whyNoNats()

if (missing === undefined) {
  const server = await natsServer()
  afterAll(() => server.remove())
  const prefix = `t${randomBytes(4).toString('hex')}`
  const connect = (options: { readonly maxPayloadBytes?: number } = {}) => NatsBus.connect({ servers: server.url, prefix, ...options })
  const bus = await connect()
  const { supports } = bus
  await bus.close()
  conformance({ describe, test }, { name: 'NatsBus', supports, connect })
} else {
  test.skip(`conformance of NatsBus (${missing})`)
}

/** What a cluster could do otherwise than one server: where several write, wait or hold at once. The whole suite takes minutes there. */

import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { afterAll, describe, test } from 'vitest'
import { NatsBus } from '../../src/nats/index.ts'
import { conformance } from '../../src/testing/conformance/index.ts'
import { NatsCluster, whyNoCluster } from '../support/nats-cluster.ts'

const missing = whyNoCluster()
const GROUPS = ['entries', 'leases']

if (missing === undefined) {
  const cluster = await NatsCluster.start()
  afterAll(() => cluster.remove())
  const prefix = `t${randomBytes(4).toString('hex')}`
  const connect = (options: { readonly maxPayloadBytes?: number } = {}) =>
    NatsBus.connect({ servers: cluster.servers, prefix, replicas: 3, ...options })
  const bus = await connect()
  const { supports } = bus
  await bus.close()
  const left = new Set(GROUPS)
  const chosen = (name: string, body: () => void) => (left.delete(name) ? describe.concurrent(name, body) : undefined)
  conformance(
    {
      describe: Object.assign(
        (name: string, body: () => void) => (name.startsWith('conformance') ? describe(name, body) : chosen(name, body)),
        { concurrent: chosen },
      ),
      test,
    },
    { name: 'NatsBus on a cluster', supports, connect },
  )
  test('the suite has these groups', () => assert.deepEqual([...left], []))
} else {
  test.skip(`conformance of NatsBus on a cluster (${missing})`)
}

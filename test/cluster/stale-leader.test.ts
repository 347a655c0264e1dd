/** A leader that was replaced and does not know it yet still answers reads: two of three servers are parted, and the third hears both. */

import { jetstreamManager } from '@nats-io/jetstream'
import { connect } from '@nats-io/transport-node'
import { expect, test } from 'vitest'
import { NatsBus } from '../../src/nats/index.ts'
import { type ClusterNode, NatsCluster, whyNoCluster } from '../support/nats-cluster.ts'
import { RouteProxies } from '../support/route-proxies.ts'
import { eventually } from '../support/wait.ts'

const missing = whyNoCluster()
const LONG_TTL_MS = 60_000
/** The old leader learns of the new one with its next heartbeat, within a second: it may be just then. */
const TRIES = 4

test.skipIf(missing !== undefined)(
  `J1 whoever reads from a leader that was replaced loses no job${missing === undefined ? '' : ` (${missing})`}`,
  async () => {
    const proxies = new RouteProxies()
    const cluster = await NatsCluster.start(proxies)
    const [old, witness, next] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
    const open = (node: ClusterNode) => NatsBus.connect({ servers: node.url, replicas: 3, jobAckWaitMs: 20_000 })
    const [reader, enqueuer] = [await open(old), await open(next)]
    const [atOld, atWitness] = [await connect({ servers: old.url }), await connect({ servers: witness.url })]
    try {
      const readByOld = await jetstreamManager(atOld, { checkAPI: false })
      const jsm = await jetstreamManager(atWitness)
      const tickets = async () => (await jsm.streams.info('klieo_work', { subjects_filter: 'klieo.work.q' })).state.messages
      await reader.jobs.claim('q', 'w', LONG_TTL_MS)
      for (let tries = 1; ; tries++) {
        await cluster.lead(old, atWitness, (what) => what === 'KV_klieo_jobs')
        await cluster.lead(witness, atWitness, (what) => what.startsWith('klieo_work'))
        const claim = reader.jobs.claim('q', 'w', LONG_TTL_MS, { waitMs: 20_000 }).catch((error) => error)
        proxies.part(old.name, next.name)
        const enqueue = () => enqueuer.jobs.enqueue('q', { payload: 'x' })
        const id = await eventually(() => enqueue().catch(() => false as const), { timeoutMs: 40_000, what: 'a new leader' })
        const read = { last_by_subj: `$KV.klieo_jobs.q.${id}.data` }
        const seen = await readByOld.streams.getMessage('KV_klieo_jobs', read).catch(() => 'not the leader any more')
        const claimed = await claim
        // It was given out, and is not ended.
        expect(await tickets()).toBe(1)
        proxies.join()
        await cluster.ready()
        const again = () => enqueuer.jobs.claim('q', 'w', LONG_TTL_MS).catch(() => false as const)
        const job = claimed?.id === id ? claimed : await eventually(again, { timeoutMs: 20_000, what: 'the job' })
        expect(job.id).toBe(id)
        await eventually(() => job.ack().then(() => true))
        if (seen === null) break
        expect(tries).toBeLessThan(TRIES)
      }
    } finally {
      await Promise.all([reader.close(), enqueuer.close(), atOld.close(), atWitness.close()])
      await cluster.remove()
    }
  },
  150_000,
)

/**
 * A cluster of three under load while its servers die, stand still and come back: what was acknowledged is there, what was acked does not come
 * back, a lease has one holder, and no call takes longer than it may (support/load.ts).
 */

import { connect, type NatsConnection } from '@nats-io/transport-node'
import { describe, expect, test } from 'vitest'
import { NatsBus } from '../../src/nats/index.ts'
import { type ClusterNode, NatsCluster, whyNoCluster } from '../support/nats-cluster.ts'
import { eventually } from '../support/wait.ts'
import { Load } from './support/load.ts'

const missing = whyNoCluster()
/** Four streams, two of them buckets of the bus's own; the durable's consumer and the queue's. */
const LED = 8

describe.skipIf(missing !== undefined)(`a cluster of NATS${missing === undefined ? '' : ` (${missing})`}`, () => {
  /** Each on a cluster of its own: what befell one is no matter of another's. */
  const onCluster = (name: string, body: (cluster: NatsCluster, nc: NatsConnection) => Promise<void>) =>
    test(name, async () => {
      const cluster = await NatsCluster.start()
      const nc = await connect({ servers: cluster.servers, maxReconnectAttempts: -1, reconnectTimeWait: 100 })
      try {
        await body(cluster, nc)
      } finally {
        await nc.close()
        await cluster.remove()
      }
    }, 120_000)

  /** Until others lead all of it. */
  const leftBy = (cluster: NatsCluster, node: ClusterNode, led: readonly string[]) =>
    eventually(
      async () => {
        const leaders = await cluster.leaders()
        return led.every((what) => leaders.has(what) && leaders.get(what) !== node)
      },
      { timeoutMs: 40_000, everyMs: 100, what: 'other leaders' },
    )

  onCluster('the leader of everything is killed, and two of three go on', async (cluster, nc) => {
    await using load = await Load.begin(cluster.servers)
    await load.progress()
    // To lead all of it, it takes over from others.
    load.fault()
    const [victim] = cluster.nodes as [ClusterNode, ...ClusterNode[]]
    const led = await cluster.lead(victim, nc, load.isOurs)
    expect(led).toHaveLength(LED)
    load.fault()
    await victim.stop('SIGKILL')
    await leftBy(cluster, victim, led)
    await load.progress()
    expect(load.failures).not.toEqual([])
    // Who comes now finds one of three away all the while.
    await using late = await Load.begin(cluster.servers)
    await late.progress()
    await Promise.all([late.end(), load.end()])
    expect(late.failures).toEqual([])
    expect(victim.isUp).toBe(false)
  })

  onCluster('a follower stands still and comes back: nobody notices but who is connected to it', async (cluster, nc) => {
    const [leader, follower, other] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
    await using load = await Load.begin([leader.url, other.url])
    await using pinned = await NatsBus.connect({ servers: follower.url, replicas: 3 })
    await load.progress()
    load.fault()
    await cluster.lead(leader, nc, load.isOurs)
    await load.calm()
    const before = load.failures.length
    follower.pause()
    const asked = performance.now()
    await Promise.all([
      load.progress(),
      expect(pinned.kv.put('pinned', 'k', '1')).rejects.toMatchObject({ code: 'connection' }),
      expect(pinned.jobs.claim('pinned', 'w', 60_000)).rejects.toMatchObject({ code: 'connection' }),
    ])
    expect(performance.now() - asked).toBeLessThan(15_000)
    expect(load.failures.slice(before)).toEqual([])
    follower.resume()
    await eventually(() => pinned.kv.put('pinned', 'k', '2'), { timeoutMs: 30_000 })
    await load.progress()
    await load.end()
  })

  onCluster('every server is restarted in turn', async (cluster) => {
    await using load = await Load.begin(cluster.servers)
    for (const node of cluster.nodes) {
      await load.progress()
      load.fault()
      await node.stop()
      node.start()
      await cluster.ready()
    }
    await load.progress()
    await load.end()
  })
})

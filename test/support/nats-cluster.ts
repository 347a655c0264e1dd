/** Three nats-servers of a test's own: a JetStream cluster on loopback, with stores that go with it. */

import { type ChildProcess, spawn } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { NatsConnection } from '@nats-io/transport-node'
import { freePort, natsServerVersion } from './nats-server.ts'
import type { RouteProxies } from './route-proxies.ts'
import { eventually } from './wait.ts'

/** Elections take 4 to 9 s, and may be drawn. */
export const ELECTED_WITHIN_MS = 40_000

/** What a server says of the streams that it has a copy of. */
interface Jsz {
  readonly meta_cluster?: { readonly leader?: string; readonly replicas?: readonly Peer[] }
  readonly account_details?: readonly { readonly stream_detail?: readonly StreamDetail[] }[]
}

interface Peer {
  readonly name: string
  readonly current: boolean
  readonly offline?: boolean
}

interface Led {
  readonly name: string
  readonly cluster?: { readonly leader?: string; readonly replicas?: readonly Peer[] }
}

interface StreamDetail extends Led {
  readonly consumer_detail?: readonly (Led & { readonly stream_name: string })[]
}

/** A stream or consumer and who leads it, by the word of the server that was asked. */
export interface Leadership {
  readonly stream: string
  readonly consumer: string | undefined
  readonly leader: string | undefined
  /** Who follows it and has everything. */
  readonly current: readonly string[]
  readonly followers: number
}

/** Why there is none to test on; `undefined`: there is one. */
export function whyNoCluster(): string | undefined {
  return natsServerVersion() === undefined ? 'no nats-server is installed' : undefined
}

export class ClusterNode {
  readonly name: string
  readonly url: string
  readonly #config: string
  readonly #monitor: string
  #process: ChildProcess | undefined
  #said = ''
  isPaused = false

  constructor(name: string, port: number, monitorPort: number, config: string) {
    this.name = name
    this.url = `127.0.0.1:${port}`
    this.#monitor = `http://127.0.0.1:${monitorPort}`
    this.#config = config
  }

  get isUp(): boolean {
    return this.#process !== undefined && !this.isPaused
  }

  /** On the same ports and store; it need not be ready when this resolves. */
  start(): void {
    if (this.#process) return
    const child = spawn('nats-server', ['-c', this.#config], { stdio: ['ignore', 'ignore', 'pipe'] })
    this.#said = ''
    child.stderr.on('data', (chunk) => {
      this.#said = (this.#said + chunk).slice(-8_000)
    })
    this.#process = child
  }

  /** @param signal SIGKILL: as a crash */
  async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    const child = this.#process
    this.#process = undefined
    this.isPaused = false
    if (!child || child.exitCode !== null || child.signalCode !== null) return
    const ended = new Promise((resolve) => child.once('exit', resolve))
    child.kill(signal)
    child.kill('SIGCONT')
    await ended
  }

  /** As if its machine had stood still: its connections stay, and nobody answers on them. */
  pause(): void {
    this.isPaused = true
    this.#process?.kill('SIGSTOP')
  }

  resume(): void {
    this.isPaused = false
    this.#process?.kill('SIGCONT')
  }

  /** What it wrote last. */
  get said(): string {
    return this.#said
  }

  /** @throws when it does not answer */
  async jsz(query = ''): Promise<Jsz> {
    const answer = await fetch(`${this.#monitor}/jsz${query}`, { signal: AbortSignal.timeout(2_000) })
    return (await answer.json()) as Jsz
  }

  /** Of the streams and consumers that it has a copy of. */
  async leaderships(): Promise<Leadership[]> {
    const { account_details: accounts = [] } = await this.jsz('?accounts=true&streams=true&consumers=true')
    const said = ({ cluster: { leader, replicas = [] } = {} }: Led) => ({
      leader: leader || undefined,
      current: replicas.filter(({ current, offline }) => current && !offline).map(({ name }) => name),
      followers: replicas.length,
    })
    return accounts
      .flatMap(({ stream_detail: streams = [] }) => streams)
      .flatMap((stream) => [
        { stream: stream.name, consumer: undefined, ...said(stream) },
        ...(stream.consumer_detail ?? []).map((consumer) => ({ stream: stream.name, consumer: consumer.name, ...said(consumer) })),
      ])
  }
}

export class NatsCluster {
  readonly nodes: readonly ClusterNode[]
  readonly #store: string

  readonly #proxies: RouteProxies | undefined

  private constructor(nodes: readonly ClusterNode[], store: string, proxies: RouteProxies | undefined) {
    this.nodes = nodes
    this.#store = store
    this.#proxies = proxies
  }

  /** @param proxies where servers are to be parted */
  static async start(proxies?: RouteProxies): Promise<NatsCluster> {
    const store = await mkdtemp(join(tmpdir(), 'klieo-nats-cluster-'))
    const names = ['one', 'two', 'three']
    const ports = await Promise.all(
      names.map(async () => ({ client: await freePort(), route: await freePort(), monitor: await freePort() })),
    )
    const reached = await Promise.all(ports.map(({ route }, n) => proxies?.before(names[n] as string, route) ?? route))
    const routes = reached.map((port) => `nats-route://127.0.0.1:${port}`).join(', ')
    const nodes = await Promise.all(
      names.map(async (name, n) => {
        const { client, route, monitor } = ports[n]!
        const config = join(store, `${name}.conf`)
        await writeFile(
          config,
          `server_name: ${name}
listen: "127.0.0.1:${client}"
http: "127.0.0.1:${monitor}"
max_payload: 16MB
jetstream { store_dir: "${join(store, name)}", max_file_store: 10GB, max_memory_store: 1GB }
cluster { name: klieo, listen: "127.0.0.1:${route}", advertise: "127.0.0.1:${reached[n]}", routes: [${routes}] }
`,
        )
        return new ClusterNode(name, client, monitor, config)
      }),
    )
    const cluster = new NatsCluster(nodes, store, proxies)
    for (const node of nodes) node.start()
    try {
      await cluster.ready()
    } catch (error) {
      await cluster.remove()
      throw error
    }
    return cluster
  }

  get servers(): string[] {
    return this.nodes.map(({ url }) => url)
  }

  get up(): ClusterNode[] {
    return this.nodes.filter(({ isUp }) => isUp)
  }

  node(name: string): ClusterNode {
    const found = this.nodes.find((node) => node.name === name)
    if (!found) throw new Error(`no server is called ${name}`)
    return found
  }

  /** Until there is a leader of the cluster, and every server that is up has caught up with everything it has a copy of. */
  async ready(): Promise<void> {
    await eventually(
      async () => {
        const { up } = this
        const leaders = await Promise.all(up.map(async (node) => (await node.jsz()).meta_cluster?.leader))
        const [leader] = leaders
        if (!leader || leaders.some((other) => other !== leader) || !up.some(({ name }) => name === leader)) return false
        const { meta_cluster: meta } = await this.node(leader).jsz()
        const current = (meta?.replicas ?? []).filter(({ current, offline }) => current && !offline)
        if (current.length !== up.length - 1) return false
        const led = await Promise.all(up.map(async (node) => (await node.leaderships()).filter(({ leader }) => leader === node.name)))
        // One without followers is kept by its server alone.
        return led.flat().every(({ current, followers }) => followers === 0 || current.length >= up.length - 1)
      },
      { timeoutMs: ELECTED_WITHIN_MS, everyMs: 50, what: `a cluster of ${this.up.map(({ name }) => name)}` },
    )
  }

  /** Who leads what by its own word and that of another server, under `stream` and `stream/consumer`. */
  async leaders(): Promise<Map<string, ClusterNode>> {
    const said = await Promise.all(
      this.up.map(async (node) => {
        const ofThis = await node.leaderships().catch(() => [])
        return ofThis.map(({ stream, consumer, leader }) => ({ what: consumer === undefined ? stream : `${stream}/${consumer}`, leader }))
      }),
    )
    const votes = new Map<string, number>()
    const leaders = new Map<string, ClusterNode>()
    for (const { what, leader } of said.flat()) {
      if (leader === undefined) continue
      const count = (votes.get(`${what} ${leader}`) ?? 0) + 1
      votes.set(`${what} ${leader}`, count)
      if (count === 2 && this.node(leader).isUp) leaders.set(what, this.node(leader))
    }
    return leaders
  }

  /** Until everything that matches is led by that server; leaders hand over to one by chance. @returns what it leads */
  async lead(node: ClusterNode, nc: NatsConnection, matches: (what: string) => boolean = () => true): Promise<string[]> {
    return eventually<string[]>(
      async () => {
        const leaders = [...(await this.leaders())].filter(([what]) => matches(what))
        const elsewhere = leaders.filter(([, leader]) => leader !== node)
        if (leaders.length > 0 && elsewhere.length === 0) return leaders.map(([what]) => what)
        for (const [what] of elsewhere) {
          const [stream, consumer] = what.split('/')
          const subject = consumer === undefined ? `STREAM.LEADER.STEPDOWN.${stream}` : `CONSUMER.LEADER.STEPDOWN.${stream}.${consumer}`
          await nc.request(`$JS.API.${subject}`, '', { timeout: 2_000 }).catch(() => {})
        }
        throw new Error(`${elsewhere.map(([what]) => what)} are led by others`)
      },
      { timeoutMs: ELECTED_WITHIN_MS, everyMs: 100, what: `that ${node.name} leads` },
    )
  }

  async remove(): Promise<void> {
    await Promise.all(this.nodes.map((node) => node.stop('SIGKILL')))
    await this.#proxies?.close()
    await rm(this.#store, { recursive: true, force: true })
  }
}

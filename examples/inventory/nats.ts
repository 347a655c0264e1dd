/** Where the bus of a run on NATS is: the server of NATS_URL, or one of its own that ends with it. */

import { spawn, spawnSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { type JetStreamManager, jetstreamManager } from '@nats-io/jetstream'
import { connect } from '@nats-io/transport-node'
import type { BusAddress } from './backend.ts'
import { textOf } from './database.ts'

const NO_SERVER =
  'there is no nats-server on the PATH, and NATS_URL is not set: install one (Debian: apt-get install nats-server, macOS: brew install ' +
  'nats-server, else https://github.com/nats-io/nats-server/releases), or set NATS_URL to one that was started with -js'

export interface NatsPlace {
  readonly address: Extract<BusAddress, { backend: 'nats' }>
  /** For people: `nats-server 2.9.10 on 127.0.0.1:40123`. */
  readonly description: string
  /** The server goes when this process does. */
  readonly own: boolean
  /** What is stored on the subjects that match, as NATS itself counts it. */
  countMessages(filter: string): Promise<number>
  /** Without `keep` what the run has made on the server goes too. */
  leave(keep: boolean): Promise<void>
}

/** @throws an Error that says what to do when there is no server */
export async function findNats(natsUrl: string | undefined): Promise<NatsPlace> {
  if (natsUrl?.includes('@')) throw new Error('NATS_URL is host:port, or several with commas between: the example connects without a user')
  if (natsUrl) return sharedServer(natsUrl.split(','))
  const server = await startServer()
  try {
    const nats = await openServer([server.url], 'klieo')
    return {
      ...nats,
      description: `nats-server ${nats.version} on ${server.url}`,
      own: true,
      leave: async () => {
        await nats.close()
        await server.stop()
      },
    }
  } catch (error) {
    await server.stop()
    throw error
  }
}

/** The server may be used by others, another run of this example among them: what is made there has a name of its own. */
async function sharedServer(servers: readonly string[]): Promise<NatsPlace> {
  try {
    const nats = await openServer(servers, `klieo_${randomBytes(4).toString('hex')}`)
    return {
      ...nats,
      description: `nats-server ${nats.version} of NATS_URL`,
      own: false,
      leave: async (keep) => {
        if (!keep) await removeStreams(nats.manager, nats.address.prefix)
        await nats.close()
      },
    }
  } catch (error) {
    throw new Error(`the bus cannot be on the server of NATS_URL: ${textOf(error)}`)
  }
}

/** A connection beside the bus's: for what an operator does with the clients of NATS. */
async function openServer(servers: readonly string[], prefix: string) {
  const connection = await connect({ servers: [...servers] })
  const manager = await jetstreamManager(connection).catch(async (error: unknown) => {
    await connection.close()
    throw error
  })
  return {
    address: { backend: 'nats' as const, servers, prefix },
    version: connection.info?.version,
    manager,
    countMessages: async (filter: string) => {
      const { state } = await manager.streams.info(`${prefix}_messages`, { subjects_filter: `${prefix}.msg.${filter}` })
      return Object.values(state.subjects ?? {}).reduce((sum, count) => sum + count, 0)
    },
    close: () => connection.close(),
  }
}

/** Every stream of a bus begins with its prefix, and the streams of its buckets with KV_ before that. */
async function removeStreams({ streams }: JetStreamManager, prefix: string): Promise<void> {
  const made: string[] = []
  for await (const name of streams.names()) if (name.replace(/^KV_/, '').startsWith(`${prefix}_`)) made.push(name)
  for (const name of made) await streams.delete(name)
}

async function startServer(): Promise<{ readonly url: string; stop(): Promise<void> }> {
  if (spawnSync('nats-server', ['--version']).status !== 0) throw new Error(NO_SERVER)
  // In a session of its own: Ctrl-C in the terminal is for this process, which needs the server to the end.
  const keeper = spawn(process.execPath, [fileURLToPath(new URL('./nats-keeper.ts', import.meta.url))], {
    detached: true,
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  keeper.stdin.on('error', () => {})
  const exited = once(keeper, 'exit')
  const [url] = await Promise.race([once(createInterface({ input: keeper.stdout }), 'line'), exited.then(() => [undefined])])
  if (typeof url !== 'string') throw new Error('nats-server did not start')
  return {
    url,
    stop: async () => {
      keeper.stdin.end()
      await exited
    },
  }
}

/**
 * Finds the servers of this test run. Postgres: DATABASE_URL where it is set, else a container where Docker answers, else the embedded
 * server. NATS: NATS_URL, else the nats-server on the PATH, else a container, else none. A line each says which, so that nobody has to guess
 * what a result was measured on.
 */

import { execFile } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import pg from 'pg'
import type { TestProject } from 'vitest/node'
import { NATS_CONFIG, natsServerVersion } from './nats-server.ts'
import type {} from './server.ts'

interface Server {
  readonly url: string
  readonly what: string
  stop(): Promise<void>
}

/** Two workers with several buses each; the 100 of a default server are tight. */
const MAX_CONNECTIONS = '300'
const DOCKER_ANSWERS_WITHIN_MS = 3_000
const NATS_PORT = 4222

/** Tests start some hundreds of processes, most of which load the same modules. */
const COMPILED = fileURLToPath(new URL('../../node_modules/.cache/klieo-bus', import.meta.url))

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  process.env.NODE_COMPILE_CACHE ??= COMPILED
  const prefix = `t${randomBytes(4).toString('hex')}_`
  const docker = dockerAnswers()
  const [server, nats] = await Promise.all([findServer(docker), findNats(docker)])
  try {
    process.stdout.write(`Tests run on ${server.what}: PostgreSQL ${await versionOf(server.url)}\nThose of NATS run on ${nats.what}\n`)
  } catch (error) {
    await Promise.all([server.stop(), nats.stop()])
    throw new Error(`${server.what} does not answer: ${error instanceof Error ? error.message : String(error)}`, { cause: error })
  }
  project.provide('databaseUrl', server.url)
  project.provide('schemaPrefix', prefix)
  project.provide('nats', { url: nats.url, missing: nats.missing })
  return async () => {
    // A container or the embedded server goes as a whole; a server of the user's own is left as it was found.
    if (server.what.startsWith('DATABASE_URL')) await dropSchemas(server.url, prefix)
    await Promise.all([server.stop(), nats.stop()])
  }
}

async function findServer(docker: Promise<boolean>): Promise<Server> {
  const url = process.env.DATABASE_URL
  if (url) return { url, what: 'DATABASE_URL', stop: async () => {} }
  return (await docker) ? startContainer().catch(startEmbeddedInstead) : startEmbedded('the embedded server')
}

interface Nats {
  /** `undefined`: whoever needs one starts the nats-server on the PATH. */
  readonly url?: string
  /** Why there is none. */
  readonly missing?: string
  readonly what: string
  stop(): Promise<void>
}

async function findNats(docker: Promise<boolean>): Promise<Nats> {
  const stop = async () => {}
  const url = process.env.NATS_URL
  if (url) return { url, what: 'NATS_URL', stop }
  const version = natsServerVersion()
  if (version !== undefined) return { what: `the nats-server on the PATH: ${version}`, stop }
  const none = (why: string): Nats => {
    const missing = `NATS_URL is not set, no nats-server is installed, and ${why}`
    return { missing, what: `nothing: ${missing}`, stop }
  }
  return (await docker)
    ? startNatsContainer().catch((error) => none(`Docker could not start the container (${firstLine(error)})`))
    : none('Docker does not answer')
}

async function startNatsContainer(): Promise<Nats> {
  const { GenericContainer, Wait } = await import('testcontainers')
  const image = process.env.KLIEO_TEST_NATS_IMAGE ?? 'nats:2.9'
  const config = '/klieo.conf'
  const container = await new GenericContainer(image)
    .withCopyContentToContainer([{ content: NATS_CONFIG, target: config }])
    .withCommand(['-c', config, '-js', '-sd', '/data'])
    .withExposedPorts(NATS_PORT)
    .withWaitStrategy(Wait.forLogMessage('Server is ready'))
    .start()
  return {
    url: `${container.getHost()}:${container.getMappedPort(NATS_PORT)}`,
    what: `Docker (${image})`,
    stop: async () => {
      await container.stop()
    },
  }
}

async function dockerAnswers(): Promise<boolean> {
  try {
    await promisify(execFile)('docker', ['info'], { timeout: DOCKER_ANSWERS_WITHIN_MS })
    return true
  } catch {
    return false
  }
}

async function startContainer(): Promise<Server> {
  const { PostgreSqlContainer } = await import('@testcontainers/postgresql')
  const image = process.env.KLIEO_TEST_IMAGE ?? 'postgres:18'
  const container = await new PostgreSqlContainer(image)
    .withCommand(['-c', `max_connections=${MAX_CONNECTIONS}`, '-c', 'fsync=off', '-c', 'full_page_writes=off'])
    .start()
  return {
    url: container.getConnectionUri(),
    what: `Docker (${image})`,
    stop: async () => {
      await container.stop()
    },
  }
}

function startEmbeddedInstead(error: unknown): Promise<Server> {
  return startEmbedded(`the embedded server, because Docker could not start the container (${firstLine(error)})`)
}

function firstLine(error: unknown): string {
  return (error instanceof Error ? error.message : String(error)).split('\n', 1)[0] as string
}

async function startEmbedded(what: string): Promise<Server> {
  const { startEmbeddedPostgres } = await import('../../src/testing/embedded-postgres.ts')
  const server = await startEmbeddedPostgres({ settings: { max_connections: MAX_CONNECTIONS } })
  return { url: server.connectionString, what, stop: () => server.stop('immediate') }
}

async function versionOf(url: string): Promise<string> {
  return withClient(url, async (client) => {
    const { rows } = await client.query('show server_version')
    return (rows[0] as { server_version: string }).server_version
  })
}

async function dropSchemas(url: string, prefix: string): Promise<void> {
  await withClient(url, async (client) => {
    const { rows } = await client.query('select nspname from pg_namespace where starts_with(nspname, $1)', [prefix])
    for (const { nspname } of rows as { nspname: string }[]) {
      await client.query(`drop schema ${client.escapeIdentifier(nspname)} cascade`)
    }
  })
}

async function withClient<T>(url: string, use: (client: pg.Client) => Promise<T>): Promise<T> {
  const client = new pg.Client({ connectionString: url, connectionTimeoutMillis: 15_000 })
  client.on('error', () => {})
  await client.connect()
  try {
    return await use(client)
  } finally {
    await client.end()
  }
}

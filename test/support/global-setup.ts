/**
 * Finds the server of this test run: DATABASE_URL where it is set, else a container where Docker answers, else the embedded
 * server. One line says which, so that nobody has to guess what a result was measured on.
 */

import { execFile } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { promisify } from 'node:util'
import pg from 'pg'
import type { TestProject } from 'vitest/node'
import type {} from './server.ts'

interface Server {
  readonly url: string
  readonly what: string
  stop(): Promise<void>
}

/** Two workers with several buses each; the 100 of a default server are tight. */
const MAX_CONNECTIONS = '300'
const DOCKER_ANSWERS_WITHIN_MS = 3_000

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  const prefix = `t${randomBytes(4).toString('hex')}_`
  const server = await findServer()
  try {
    process.stdout.write(`Tests run on ${server.what}: PostgreSQL ${await versionOf(server.url)}\n`)
  } catch (error) {
    await server.stop()
    throw new Error(`${server.what} does not answer: ${error instanceof Error ? error.message : String(error)}`, { cause: error })
  }
  project.provide('databaseUrl', server.url)
  project.provide('schemaPrefix', prefix)
  return async () => {
    // A container or the embedded server goes as a whole; a server of the user's own is left as it was found.
    if (server.what.startsWith('DATABASE_URL')) await dropSchemas(server.url, prefix)
    await server.stop()
  }
}

async function findServer(): Promise<Server> {
  const url = process.env.DATABASE_URL
  if (url) return { url, what: 'DATABASE_URL', stop: async () => {} }
  return (await dockerAnswers()) ? startContainer().catch(startEmbeddedInstead) : startEmbedded('the embedded server')
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
  const why = error instanceof Error ? error.message.split('\n', 1)[0] : String(error)
  return startEmbedded(`the embedded server, because Docker could not start the container (${why})`)
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

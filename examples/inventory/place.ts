/** Where the run takes place: DATABASE_URL, or a PostgreSQL of its own that ends with it. */

import { randomBytes } from 'node:crypto'
import { startEmbeddedPostgres } from 'klieo-bus/testing'
import type pg from 'pg'
import { connect, type Schemas, textOf } from './database.ts'

export interface Place {
  readonly url: string
  readonly schemas: Schemas
  /** Shared by the bus and the app: its transactions are what the bus takes part in. */
  readonly pool: pg.Pool
  /** For people: `PostgreSQL 18.4 on 127.0.0.1:40123`. */
  readonly description: string
  /** A command that opens the database when it is pasted into a shell. */
  readonly psql: string
  /** The server goes when this process does. */
  readonly embedded: boolean
  /** Ends the pool. Without `keep` everything that the run has made goes too. */
  leave(keep: boolean): Promise<void>
}

export async function findPlace(databaseUrl: string | undefined): Promise<Place> {
  if (databaseUrl) return sharedServer(databaseUrl)
  // They are meant for another server, and pg would follow them.
  for (const name of Object.keys(process.env)) if (name.startsWith('PG')) delete process.env[name]
  const server = await startEmbeddedPostgres()
  const pool = connect(server.connectionString)
  return {
    url: server.connectionString,
    schemas: { inventory: 'inventory', bus: 'klieo' },
    pool,
    description: `PostgreSQL ${server.version} on 127.0.0.1:${server.port}, embedded`,
    psql: `psql '${server.connectionString}'`,
    embedded: true,
    leave: async () => {
      await pool.end()
      await server.stop('immediate')
    },
  }
}

/** The server may be used by others, another run of this example among them: the schemas have names of their own. */
async function sharedServer(url: string): Promise<Place> {
  const suffix = randomBytes(4).toString('hex')
  const schemas = { inventory: `inventory_${suffix}`, bus: `klieo_${suffix}` }
  const pool = connect(url)
  try {
    const { rows } = await pool.query<{ version: string }>(`select current_setting('server_version') as version`)
    return {
      url,
      schemas,
      pool,
      description: `PostgreSQL ${rows[0]!.version.split(' ')[0]} of DATABASE_URL`,
      psql: 'psql "$DATABASE_URL"',
      embedded: false,
      leave: async (keep) => {
        if (!keep) await pool.query(dropSchemas(schemas))
        await pool.end()
      },
    }
  } catch (error) {
    await pool.end()
    throw new Error(`the server of DATABASE_URL does not answer: ${textOf(error)}`)
  }
}

export function dropSchemas({ inventory, bus }: Schemas): string {
  return `drop schema if exists ${inventory}, ${bus} cascade`
}

import pg from 'pg'
import type { Client, OpenTransaction } from './client.ts'

export async function connect(connectionString: string): Promise<Client> {
  const pool = new pg.Pool({ connectionString, max: 2 })
  // pg ends the process otherwise, when a connection breaks.
  pool.on('error', () => {})
  pool.on('connect', (client) => client.on('error', () => {}))
  const opened = (client: pg.ClientBase): OpenTransaction => ({
    tx: client,
    insert: (id) => client.query('insert into rows values ($1)', [id]),
  })
  return {
    async transaction(work) {
      const client = await pool.connect()
      try {
        await client.query('begin')
        await work(opened(client))
        await client.query('commit')
      } catch (error) {
        await client.query('rollback').catch(() => {})
        throw error
      } finally {
        client.release()
      }
    },
    mistaken: { pool: () => pool as never },
    knowsOver: false,
  }
}

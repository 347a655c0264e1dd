/** Plain connections, for races that are written out as the steps of two sessions. */

import pg from 'pg'
import { eventually } from './wait.ts'

export interface Session extends pg.Client {
  /** The backend's process id on the server. */
  readonly pid: number
  [Symbol.asyncDispose](): Promise<void>
}

/** A server that was killed or stopped never answers a goodbye. */
const GOODBYE_MS = 2_000

/** A connected client. That its connection ends, by a kill or a crash of the server, is no event of the test's process. */
export async function session(url: string, options: { readonly applicationName?: string } = {}): Promise<Session> {
  const client = new pg.Client({ connectionString: url, application_name: options.applicationName ?? 'test session' })
  client.on('error', () => {})
  await client.connect()
  const { rows } = await client.query('select pg_backend_pid() as pid')
  return Object.assign(client, {
    pid: (rows[0] as { pid: number }).pid,
    [Symbol.asyncDispose]: async () => {
      const ended = client.end().catch(() => {})
      const tooLate = Promise.withResolvers<void>()
      const timer = setTimeout(tooLate.resolve, GOODBYE_MS)
      await Promise.race([ended, tooLate.promise])
      clearTimeout(timer)
      ;(client as unknown as { connection: { stream: { destroy(): void } } }).connection.stream.destroy()
    },
  })
}

/** Resolves once the backend `pid` waits for a lock that another holds: the moment an interleaving is complete. */
export async function untilBlocked(observer: pg.ClientBase | pg.Pool, pid: number): Promise<void> {
  await eventually(
    async () => {
      const { rows } = await observer.query('select cardinality(pg_blocking_pids($1)) as blockers', [pid])
      return (rows[0] as { blockers: number }).blockers > 0
    },
    { what: `backend ${pid} waiting for a lock` },
  )
}

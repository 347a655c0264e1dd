/** What the server says of the connections of a bus, and their ends. */

import type pg from 'pg'
import { eventually } from '../../../support/wait.ts'

export function named(url: string, name: string): string {
  const changed = new URL(url)
  changed.searchParams.set('application_name', name)
  return changed.href
}

/** Resolves once a connection of that name waits for a lock, in a statement that matches. @returns its process id */
export function untilWaiting(observer: pg.ClientBase, name: string, statement = ''): Promise<number> {
  return eventually(
    async () => {
      const { rows } = await observer.query(
        `select pid from pg_stat_activity
         where application_name = $1 and wait_event_type = 'Lock' and query ~ $2`,
        [name, statement],
      )
      return (rows[0] as { pid: number } | undefined)?.pid ?? 0
    },
    { what: `a statement of "${name}" that waits for a lock`, timeoutMs: 60_000 },
  )
}

/** Ends a connection and waits until the server has forgotten it. */
export async function terminate(observer: pg.ClientBase, pid: number): Promise<void> {
  await observer.query('select pg_terminate_backend($1)', [pid])
  await eventually(async () => (await observer.query('select from pg_stat_activity where pid = $1', [pid])).rowCount === 0, {
    what: `the end of backend ${pid}`,
  })
}

/** How many rows a query counts. */
export async function count(observer: pg.ClientBase, from: string, values: unknown[] = []): Promise<number> {
  const { rows } = await observer.query(`select count(*)::int as n from ${from}`, values)
  return (rows[0] as { n: number }).n
}

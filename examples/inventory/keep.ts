/** With --keep: how to look at what the run has left. */

import { dropSchemas, type Place } from './place.ts'
import type { Screen } from './screen.ts'

export function printAfterlife(screen: Screen, { psql, schemas, embedded }: Place): void {
  const { inventory, bus } = schemas
  const step = (what: string, sql: string) => screen.print(`  ${screen.dim(`-- ${what}`)}\n  ${sql}\n`)
  screen.print(`\n  Open the database with\n\n  ${screen.bold(psql)}\n\n  and ask\n`)
  step(
    'who did how much, and which job needed a second attempt?',
    `select worker, count(*), max(attempt) from ${inventory}.results group by worker;`,
  )
  step(
    'which messages came last?',
    `select seq, subject, published_at::time(2) as at, payload_text::json ->> 'path' as path,\n    payload_text::json ->> 'worker' as worker, payload_text::json ->> 'attempt' as attempt\n  from ${bus}.message_details order by seq desc limit 5;`,
  )
  step(
    'SQL is an interface too: put a job in a queue, and look at the queue.',
    `select ${bus}.enqueue('later', 'hello', run_at => now() + interval '1 hour');\n  select queue, ready, scheduled, running, dead from ${bus}.queue_stats;`,
  )
  screen.print(embedded ? '  The server stays up until Ctrl-C.' : `  When you have seen enough: ${dropSchemas(schemas)};`)
}

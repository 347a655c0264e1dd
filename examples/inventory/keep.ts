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
  step('what was published last?', `select seq, subject, payload_text from ${bus}.message_details\n  order by seq desc limit 3;`)
  step(
    'SQL is an interface too: put a job in a queue, and look at the queue.',
    `select ${bus}.enqueue('later', 'hello', run_at => now() + interval '1 hour');\n  select queue, ready, scheduled, running, dead from ${bus}.queue_stats;`,
  )
  screen.print(embedded ? '  The server stays up until Ctrl-C.' : `  When you have seen enough: ${dropSchemas(schemas)};`)
}

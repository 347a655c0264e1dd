/** With --keep: how to look at what the run has left. */

import type { NatsPlace } from './nats.ts'
import { dropSchemas, type Place } from './place.ts'
import type { Screen } from './screen.ts'
import { RESULTS } from './topics.ts'

/** @param nats where the bus is not in the database */
export function printAfterlife(screen: Screen, { psql, schemas, embedded }: Place, nats?: NatsPlace): void {
  const { inventory, bus } = schemas
  const step = (what: string, sql: string) => screen.print(`  ${screen.dim(`-- ${what}`)}\n  ${sql}\n`)
  screen.print(`\n  Open the database with\n\n  ${screen.bold(psql)}\n\n  and ask\n`)
  step(
    'who did how much, and which job needed a second attempt?',
    `select worker, count(*), max(attempt) from ${inventory}.results group by worker;`,
  )
  if (nats) {
    step('what was tried again, and known by its key?', `select path, worker, attempt, tries from ${inventory}.results where tries > 1;`)
    screen.print('  The bus, with nothing but the clients of NATS, in this directory:\n')
    screen.print(`${lastMessage(nats)}\n`)
  } else {
    step(
      'which messages came last?',
      `select seq, subject, published_at::time(2) as at, payload_text::json ->> 'path' as path,\n    payload_text::json ->> 'worker' as worker, payload_text::json ->> 'attempt' as attempt\n  from ${bus}.message_details order by seq desc limit 5;`,
    )
    step(
      'SQL is an interface too: put a job in a queue, and look at the queue.',
      `select ${bus}.enqueue('later', 'hello', run_at => now() + interval '1 hour');\n  select queue, ready, scheduled, running, dead from ${bus}.queue_stats;`,
    )
  }
  if (embedded) screen.print(`  The ${nats?.own ? 'servers stay' : 'server stays'} up until Ctrl-C.`)
  else {
    if (nats?.own) screen.print('  The nats-server stays up until Ctrl-C.')
    screen.print(`  When you have seen enough: ${dropSchemas(schemas)};`)
  }
  if (nats && !nats.own) screen.print(`  The streams on NATS stay until you have removed them:\n\n${removal(nats)}`)
}

/** A program for the Node of any shell. */
function program({ address, own }: NatsPlace, ...lines: string[]): string {
  const servers = own ? `'${address.servers.join()}'` : 'process.env.NATS_URL'
  return [
    `  node --input-type=module -e "`,
    `  import { connect } from '@nats-io/transport-node'`,
    `  import { jetstreamManager } from '@nats-io/jetstream'`,
    `  const nats = await connect({ servers: ${servers}${own ? '' : ".split(',')"} })`,
    '  const { streams } = await jetstreamManager(nats)',
    ...lines.map((line) => `  ${line}`),
    `  await nats.close()"`,
  ].join('\n')
}

function lastMessage(nats: NatsPlace): string {
  const { prefix } = nats.address
  return program(
    nats,
    `const subject = '${prefix}.msg.${RESULTS.installed}'`,
    `const last = await streams.getMessage('${prefix}_messages', { last_by_subj: subject })`,
    'console.log(last.seq, last.subject, last.string())',
  )
}

function removal(nats: NatsPlace): string {
  return program(
    nats,
    'const made = []',
    `for await (const name of streams.names()) if (name.includes('${nats.address.prefix}_')) made.push(name)`,
    'for (const name of made) await streams.delete(name)',
  )
}

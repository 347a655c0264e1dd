/** Counts what is in a record. */

import { createReadStream } from 'node:fs'
import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { Answers, Call, Entry } from './record.ts'

interface Outcomes {
  ok: number
  refused: number
  /** It may have happened: the answer was lost, or the process killed. */
  ambiguous: number
}

export interface Tally {
  readonly calls: Map<string, Outcomes>
  readonly counts: Map<string, number>
  /** Refusals and lost answers, by code. */
  readonly codes: Map<string, number>
}

const AMBIGUOUS: ReadonlySet<string> = new Set(['connection', 'closed', 'timeout', 'internal'])

export async function tally(directory: string): Promise<Tally> {
  const all: Tally = { calls: new Map(), counts: new Map(), codes: new Map() }
  const files = (await readdir(directory)).filter((file) => file.endsWith('.jsonl'))
  for (const file of files) await tallyFile(join(directory, file), all)
  return all
}

async function tallyFile(path: string, { calls, counts, codes }: Tally): Promise<void> {
  const open = new Map<number, Call>()
  const add = (name: string, by = 1) => counts.set(name, (counts.get(name) ?? 0) + by)
  const outcomes = (call: Call) => {
    const name =
      'tx' in call && call.do !== 'commit' && call.do !== 'rollback' && call.tx !== undefined ? `${call.do} in a transaction` : call.do
    if (!calls.has(name)) calls.set(name, { ok: 0, refused: 0, ambiguous: 0 })
    return calls.get(name)!
  }
  for await (const line of createInterface({ input: createReadStream(path) })) {
    const entry = parse(line)
    if (!entry) continue
    switch (entry.kind) {
      case 'call':
        open.set(entry.op, entry.call)
        break
      case 'ok': {
        const call = open.get(entry.op)!
        open.delete(entry.op)
        outcomes(call).ok++
        count(call, entry.answer, add)
        break
      }
      case 'err': {
        const call = open.get(entry.op)!
        open.delete(entry.op)
        const lost = AMBIGUOUS.has(entry.code) || (entry.code.startsWith('sql:') && entry.code !== 'sql:rolled_back')
        outcomes(call)[lost ? 'ambiguous' : 'refused']++
        const code = `${call.do}: ${entry.code}`
        codes.set(code, (codes.get(code) ?? 0) + 1)
        break
      }
      case 'delivered':
        add('deliveries')
        if (entry.attempt > 1) add('redeliveries')
        if (entry.dlq) add('dead letters delivered')
        break
      case 'handling':
        add('requests handled')
        break
      case 'process':
        add('processes')
        break
    }
  }
  for (const call of open.values()) {
    outcomes(call).ambiguous++
    add('calls without an answer')
  }
}

function count(call: Call, answer: Answers[keyof Answers] | undefined, add: (name: string, by?: number) => void): void {
  switch (call.do) {
    case 'publish':
      if ((answer as Answers['publish']).duplicate) add('publishes answered as duplicates')
      break
    case 'claim': {
      const { jobs } = answer as Answers['claim']
      add('jobs claimed', jobs.length)
      add('jobs claimed again', jobs.filter(({ attempt }) => attempt > 1).length)
      break
    }
    case 'lease':
      add('leases granted')
      break
  }
}

/** The last line of a process that was killed may be a part of one. */
function parse(line: string): Entry | undefined {
  try {
    return JSON.parse(line) as Entry
  } catch {
    return undefined
  }
}

export function describe({ calls, counts, codes }: Tally): string {
  const rows = [...calls].sort(([a], [b]) => (a < b ? -1 : 1))
  const table = rows.map(
    ([name, { ok, refused, ambiguous }]) => `  ${name.padEnd(28)}${pad(ok)} ok${pad(refused)} refused${pad(ambiguous)} ambiguous`,
  )
  return [
    'operations',
    ...table,
    'refusals and lost answers',
    ...[...codes].sort(([a], [b]) => (a < b ? -1 : 1)).map(([code, times]) => `  ${code.padEnd(40)}${pad(times)}`),
    'counts',
    ...[...counts].sort(([a], [b]) => (a < b ? -1 : 1)).map(([name, times]) => `  ${name.padEnd(40)}${pad(times)}`),
  ].join('\n')
}

function pad(count: number): string {
  return count.toLocaleString('en').padStart(9)
}

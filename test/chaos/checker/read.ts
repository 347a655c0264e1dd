/** Reads the files of a run, line by line: a run may be larger than a string can be. */

import { createReadStream, existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Call, Entry, FinalState } from '../record.ts'
import { History, Op, Process } from './history.ts'

export async function read(directory: string): Promise<History> {
  const history = new History()
  const files = readdirSync(directory).filter((file) => file.endsWith('.jsonl'))
  if (files.length === 0) throw new Error(`${directory} holds no records (*.jsonl)`)
  for (const file of files.sort()) await readFile(history, directory, file)
  const meta = join(directory, 'meta.json')
  if (existsSync(meta)) history.solo = new Set((JSON.parse(readFileSync(meta, 'utf8')) as { solo?: string[] }).solo ?? [])
  history.final = JSON.parse(readFileSync(join(directory, 'final.json'), 'utf8')) as FinalState
  history.sort()
  return history
}

async function readFile(history: History, directory: string, file: string): Promise<void> {
  const process = new Process(file.replace(/\.jsonl$/, ''))
  history.processes.push(process)
  const open = new Map<number, Op>()
  let torn: string | undefined
  for await (const line of lines(join(directory, file))) {
    if (torn !== undefined) throw new Error(`${file} holds a line that is no entry, and not its last: ${torn.slice(0, 200)}`)
    let entry: Entry
    try {
      entry = JSON.parse(line) as Entry
    } catch {
      // The last words of a process that was killed.
      torn = line
      continue
    }
    history.entries++
    if (entry.at > history.lastAt) history.lastAt = entry.at
    take(history, process, open, entry)
  }
  for (const op of open.values()) history.ended(op)
}

function take(history: History, process: Process, open: Map<number, Op>, entry: Entry): void {
  switch (entry.kind) {
    case 'call':
      open.set(entry.op, new Op<Call>(process, entry.op, entry.at, entry.call))
      break
    case 'ok':
    case 'err': {
      const op = open.get(entry.op)
      if (!op) throw new Error(`${process.file} holds an answer to call ${entry.op}, which it does not hold`)
      open.delete(entry.op)
      op.end = entry.at
      op.outcome = entry.kind
      if (entry.kind === 'ok') op.answer = entry.answer
      else {
        op.code = entry.code
        op.actual = entry.actual
      }
      history.ended(op)
      break
    }
    case 'delivered':
      history.yielded(process, entry)
      break
    case 'handling':
      history.handlings.push({ process, entry })
      history.count('requests handled')
      break
    case 'fault':
      history.faults.push(entry)
      history.count(`fault: ${entry.fault}`)
      break
    case 'process':
      process.name = entry.name
      process.role = entry.role
      history.count('processes')
      break
  }
}

async function* lines(path: string): AsyncGenerator<string> {
  let rest = ''
  for await (const chunk of createReadStream(path, { encoding: 'utf8', highWaterMark: 1 << 20 })) {
    const parts = (rest + (chunk as string)).split('\n')
    rest = parts.pop() as string
    yield* parts
  }
  if (rest !== '') yield rest
}

/** Records of runs that never happened, written by hand, for the tests of the checker. Times are in ms. */

import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { check, type Report } from './checker/index.ts'
import type { Answers, Call, Entry, FinalState } from './record.ts'

type Answer = Answers[keyof Answers]
/** What became of a call: an answer, an error's code, or nothing that anybody knows. */
export type Outcome = { readonly ok: Answer | true } | { readonly err: string; readonly actual?: number | null } | 'none'

type Mutable<T> = { -readonly [K in keyof T]: T[K] extends readonly (infer E)[] ? E[] : T[K] }

const MS = 1_000

export class Invented {
  readonly #lines = new Map<string, string[]>()
  #ops = 0
  readonly final: Mutable<FinalState> = { durables: [], messages: [], jobs: [], entries: [] }
  readonly solo: string[] = []

  write(process: string, entry: Entry): void {
    const lines = this.#lines.get(process)
    const line = JSON.stringify(entry)
    if (lines) lines.push(line)
    else this.#lines.set(process, [JSON.stringify({ kind: 'process', at: 0, name: process, role: 'test', pid: 1 } satisfies Entry), line])
  }

  call(call: Call, from: number, to: number, outcome: Outcome = { ok: true }, process = 'a'): void {
    const op = ++this.#ops
    this.write(process, { kind: 'call', op, at: from * MS, call })
    if (outcome === 'none') return
    if ('ok' in outcome) this.write(process, { kind: 'ok', op, at: to * MS, ...(outcome.ok === true ? {} : { answer: outcome.ok }) })
    else {
      const { err: code, actual } = outcome
      this.write(process, { kind: 'err', op, at: to * MS, code, retryable: false, ...(actual === undefined ? {} : { actual }) })
    }
  }

  fault(fault: string, target: string, at = 0): void {
    this.write('runner', { kind: 'fault', at: at * MS, fault, target })
  }

  durable(name: string, filter: string, maxDeliver: number | null = null, unsettled: number[] = []): void {
    this.final.durables.push({ name, filter, maxDeliver, unsettled })
  }

  stored(seq: number, id: string | null, subject = 'shop.a', headers: Record<string, string> = {}): void {
    this.final.messages.push({ seq, id, subject, headers })
  }

  /** A message that was published and stored. */
  published(seq: number, id: string, from: number, to: number, more: Partial<Extract<Call, { do: 'publish' }>> = {}): void {
    this.publish(id, from, to, { ok: { seq, duplicate: false } }, more)
    this.stored(seq, id, more.subject)
  }

  publish(id: string, from: number, to: number, outcome: Outcome, more: Partial<Extract<Call, { do: 'publish' }>> = {}): void {
    this.call({ do: 'publish', id, subject: 'shop.a', publisher: 'p', order: 1, after: 0, ...more }, from, to, outcome)
  }

  delivered(
    seq: number,
    id: string,
    attempt: number,
    at: number,
    more: Partial<Extract<Entry, { kind: 'delivered' }>> = {},
    process = 'a',
  ): void {
    this.write(process, {
      kind: 'delivered',
      at: at * MS,
      stream: 's1',
      member: process,
      durable: 'd',
      ackWaitMs: 1_000,
      id,
      subject: 'shop.a',
      seq,
      attempt,
      ...more,
    })
  }

  settle(
    what: 'ack' | 'nak' | 'term' | 'extend',
    seq: number,
    attempt: number,
    from: number,
    to: number,
    outcome: Outcome = { ok: true },
    more: { tx?: string; delayMs?: number; durable?: string } = {},
  ): void {
    this.call({ do: what, durable: 'd', seq, attempt, ...more }, from, to, outcome)
  }

  enqueued(job: string, id: string, from: number, to: number, more: Partial<Extract<Call, { do: 'enqueue' }>> = {}): void {
    this.call({ do: 'enqueue', id, queue: 'q', maxAttempts: 3, ...more }, from, to, { ok: { job } })
  }

  claimed(job: string, id: string, attempt: number, from: number, to: number, ttlMs = 1_000, process = 'a'): void {
    this.call({ do: 'claim', queue: 'q', limit: 1, ttlMs }, from, to, { ok: { jobs: [{ job, id, attempt }] } }, process)
  }

  settleJob(
    what: 'jobAck' | 'jobNak' | 'jobHeartbeat' | 'jobDeadLetter',
    job: string,
    attempt: number,
    from: number,
    to: number,
    outcome: Outcome = { ok: true },
    more: { tx?: string; delayMs?: number } = {},
  ): void {
    this.call({ do: what, job, attempt, ttlMs: 1_000, ...more }, from, to, outcome)
  }

  async check(torn = ''): Promise<Report> {
    const directory = mkdtempSync(join(tmpdir(), 'chaos-invented-'))
    try {
      for (const [process, lines] of this.#lines) writeFileSync(join(directory, `${process}.jsonl`), `${lines.join('\n')}\n${torn}`)
      writeFileSync(join(directory, 'final.json'), JSON.stringify(this.final))
      writeFileSync(join(directory, 'meta.json'), JSON.stringify({ solo: this.solo }))
      return await check(directory)
    } finally {
      rmSync(directory, { recursive: true })
    }
  }
}

/** One record that breaks a rule, seldom one more that goes with it, and the same but for what makes it innocent. */
export function caught(name: string, rules: string | readonly string[], invent: (record: Invented, breaks: boolean) => void): void {
  test(`${name}: caught, and its innocent neighbour is not`, async () => {
    const innocent = new Invented()
    invent(innocent, false)
    expect((await innocent.check()).violations).toEqual([])
    const broken = new Invented()
    invent(broken, true)
    const { violations } = await broken.check()
    expect([...new Set(violations.map(({ rule }) => rule))].sort()).toEqual([rules].flat())
    for (const { evidence, text } of violations) {
      expect(text).not.toBe('')
      expect(evidence.length).toBeGreaterThan(0)
    }
  })
}

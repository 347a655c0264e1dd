/** The record of a run in memory: every call with its answer, and what was seen, in lists by kind. */

import type { Answers, Call, Entry, FinalState } from '../record.ts'
import { Shown } from './report.ts'

type Of<D extends Call['do'], C = Call> = C extends { readonly do: infer E } ? (D extends E ? C : never) : never
export type PublishCall = Of<'publish'>
export type EnqueueCall = Of<'enqueue'>
export type SettleCall = Of<'ack'>
export type ClaimCall = Of<'claim'>
export type JobCall = Of<'jobAck'>
export type LeaseCall = Of<'lease'>
export type LeaseUseCall = Of<'leaseHeartbeat'>
export type KeyCall = Of<'get'> | Of<'put'> | Of<'cas'> | Of<'delete'>
export type RequestCall = Of<'request'>
export type CloseCall = Of<'close'>
export type PutBackCall = Of<'jobPutBack'>
export type EndCall = Of<'commit'>
export type Delivered = Extract<Entry, { readonly kind: 'delivered' }>
export type Handling = Extract<Entry, { readonly kind: 'handling' }>
export type Fault = Extract<Entry, { readonly kind: 'fault' }>
export type StoredMessage = FinalState['messages'][number]

/** Microseconds in a millisecond: durations are given in ms, times in µs. */
export const MS = 1_000

export function getOrAdd<K, V>(map: Map<K, V>, key: K, make: () => V): V {
  const found = map.get(key)
  if (found !== undefined) return found
  const made = make()
  map.set(key, made)
  return made
}

export class Process {
  readonly file: string
  name: string
  role = ''
  /** Whether a bus or stream of it closes, and when. */
  readonly closes: Op<CloseCall>[] = []

  constructor(file: string) {
    this.file = file
    this.name = file
  }
}

/** A call and what became of it. */
export class Op<C extends Call = Call> extends Shown {
  readonly call: C
  readonly process: Process
  readonly op: number
  readonly at: number
  /** When it was answered; never: Infinity. */
  end = Number.POSITIVE_INFINITY
  /** `none`: nobody knows, the process was killed. */
  outcome: 'ok' | 'err' | 'none' = 'none'
  answer: Answers[keyof Answers] | undefined
  code = ''
  actual: number | null | undefined

  constructor(process: Process, op: number, at: number, call: C) {
    super()
    this.process = process
    this.op = op
    this.at = at
    this.call = call
  }

  get ok(): boolean {
    return this.outcome === 'ok'
  }

  override toString(): string {
    const end =
      this.outcome === 'none' ? 'no answer' : `${this.end} ${this.outcome} ${this.code}${this.answer ? JSON.stringify(this.answer) : ''}`
    const actual = this.actual === undefined ? '' : ` actual ${this.actual}`
    return `${this.process.name}#${this.op} ${this.at}..${end}${actual} ${JSON.stringify(this.call)}`
  }
}

/** All that is known of one message and one durable. */
export interface Pair {
  readonly durable: string
  readonly seq: number
  /** In the order of their times. */
  readonly yields: Yield[]
  readonly settles: Op<SettleCall>[]
}

export class Yield extends Shown {
  readonly entry: Delivered
  readonly process: Process

  constructor(process: Process, entry: Delivered) {
    super()
    this.process = process
    this.entry = entry
  }

  override toString(): string {
    return `${this.process.name} ${JSON.stringify(this.entry)}`
  }
}

/** One job in an answer to a claim. */
export class Grant extends Shown {
  readonly claim: Op<ClaimCall>
  readonly job: string
  readonly id: string
  readonly attempt: number

  constructor(claim: Op<ClaimCall>, job: string, id: string, attempt: number) {
    super()
    this.claim = claim
    this.job = job
    this.id = id
    this.attempt = attempt
  }

  override toString(): string {
    const { process, op, at, end, call } = this.claim
    return `${process.name}#${op} ${at}..${end} claimed job ${this.job} (${this.id}) attempt ${this.attempt} for ${call.ttlMs} ms from ${call.queue}`
  }
}

/** All that is known of one job, by its number. */
export interface JobLife {
  readonly job: string
  /** By the ends of their claims. */
  readonly grants: Grant[]
  readonly settles: Op<JobCall>[]
  readonly putBacks: Op<PutBackCall>[]
}

export class History {
  readonly processes: Process[] = []
  entries = 0
  lastAt = 0
  readonly counts: Record<string, number> = {}
  readonly publishes: Op<PublishCall>[] = []
  readonly enqueues: Op<EnqueueCall>[] = []
  readonly claims: Op<ClaimCall>[] = []
  readonly leases: Op<LeaseCall>[] = []
  readonly leaseUses: Op<LeaseUseCall>[] = []
  readonly keys: Op<KeyCall>[] = []
  readonly requests: Op<RequestCall>[] = []
  readonly closes: Op<CloseCall>[] = []
  readonly ends: Op<EndCall>[] = []
  readonly unanswered: Op[] = []
  readonly handlings: { readonly process: Process; readonly entry: Handling }[] = []
  readonly faults: Fault[] = []
  /** Yields in the order of each process. */
  readonly yields: Yield[] = []
  readonly pairs = new Map<string, Map<number, Pair>>()
  readonly jobs = new Map<string, JobLife>()
  /** Durables that had one stream at a time. */
  solo: ReadonlySet<string> = new Set()
  final: FinalState = { durables: [], messages: [], jobs: [], entries: [] }

  count(what: string): void {
    this.counts[what] = (this.counts[what] ?? 0) + 1
  }

  pair(durable: string, seq: number): Pair {
    const pairs = getOrAdd(this.pairs, durable, () => new Map<number, Pair>())
    return getOrAdd(pairs, seq, () => ({ durable, seq, yields: [], settles: [] }))
  }

  job(job: string): JobLife {
    return getOrAdd(this.jobs, job, () => ({ job, grants: [], settles: [], putBacks: [] }))
  }

  /** A call was answered, or never will be. */
  ended(op: Op): void {
    const { call } = op
    this.count(
      `${call.do}${'tx' in call && call.tx !== undefined && call.do !== 'commit' && call.do !== 'rollback' ? ' in tx' : ''}: ${op.ok ? 'ok' : op.outcome === 'none' ? 'no answer' : op.code}`,
    )
    if (op.outcome === 'none') this.unanswered.push(op)
    switch (call.do) {
      case 'publish':
        this.publishes.push(op as Op<PublishCall>)
        break
      case 'enqueue':
        this.enqueues.push(op as Op<EnqueueCall>)
        break
      case 'commit':
      case 'rollback':
        this.ends.push(op as Op<EndCall>)
        break
      case 'ack':
      case 'nak':
      case 'term':
      case 'extend':
        this.pair(call.durable, call.seq).settles.push(op as Op<SettleCall>)
        break
      case 'claim': {
        const claim = op as Op<ClaimCall>
        this.claims.push(claim)
        if (!op.ok) break
        for (const { job, id, attempt } of (op.answer as Answers['claim']).jobs) {
          this.job(job).grants.push(new Grant(claim, job, id, attempt))
          this.count(attempt === 1 ? 'jobs claimed' : 'jobs claimed again')
        }
        break
      }
      case 'jobAck':
      case 'jobNak':
      case 'jobHeartbeat':
      case 'jobDeadLetter':
        this.job(call.job).settles.push(op as Op<JobCall>)
        break
      case 'jobPutBack':
        this.job(call.job).putBacks.push(op as Op<PutBackCall>)
        break
      case 'lease':
        this.leases.push(op as Op<LeaseCall>)
        break
      case 'leaseHeartbeat':
      case 'leaseRelease':
        this.leaseUses.push(op as Op<LeaseUseCall>)
        break
      case 'get':
      case 'put':
      case 'cas':
      case 'delete':
        this.keys.push(op as Op<KeyCall>)
        break
      case 'request':
        this.requests.push(op as Op<RequestCall>)
        break
      case 'close':
        this.closes.push(op as Op<CloseCall>)
        op.process.closes.push(op as Op<CloseCall>)
        break
    }
  }

  yielded(process: Process, entry: Delivered): void {
    const one = new Yield(process, entry)
    this.yields.push(one)
    this.pair(entry.durable, entry.seq).yields.push(one)
    this.count(entry.attempt === 1 ? 'deliveries' : 'redeliveries')
    if (entry.dlq) this.count('dead letters delivered')
  }

  /** Puts into the order of time what came from several files. */
  sort(): void {
    const byCall = (a: Op, b: Op) => a.at - b.at
    for (const pairs of this.pairs.values()) {
      for (const { yields, settles } of pairs.values()) {
        if (yields.length > 1) yields.sort((a, b) => a.entry.at - b.entry.at)
        if (settles.length > 1) settles.sort(byCall)
      }
    }
    for (const { grants, settles, putBacks } of this.jobs.values()) {
      grants.sort((a, b) => a.claim.end - b.claim.end)
      settles.sort(byCall)
      putBacks.sort(byCall)
    }
    for (const ops of [this.publishes, this.enqueues, this.claims, this.leases, this.leaseUses, this.keys, this.ends])
      (ops as Op[]).sort(byCall)
  }
}

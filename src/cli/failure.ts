/** How a command ends: the exit codes, and the one sentence that goes with a failure. docs/command-line.md lists the codes. */

import type { BusError, BusErrorCode } from '../index.ts'
import { printable } from './text.ts'

export const EXIT = {
  done: 0,
  failed: 1,
  usage: 2,
  absent: 3,
  taken: 4,
  lost: 5,
  late: 6,
  interrupted: 130,
} as const

export const EXIT_CODES: Readonly<Record<number, string>> = {
  0: 'done',
  1: 'failed: the message says why',
  2: 'wrong usage, or a value that breaks a rule; nothing was sent',
  3: 'not there: no such key, job, durable; no live responder',
  4: 'somebody else was first: another revision, a held lease, a running server',
  5: 'the lease was lost',
  6: 'no answer in time',
  130: 'interrupted before it was done',
}

/** A failure that is told in one sentence. */
export class Failure extends Error {
  readonly exitCode: number

  constructor(exitCode: number, message: string, options?: ErrorOptions) {
    super(message, options)
    this.exitCode = exitCode
  }
}

/** Wrong usage. */
export class UsageError extends Failure {
  /** Whether the help says more than the message. */
  readonly seeHelp: boolean

  constructor(message: string, { seeHelp = true }: { readonly seeHelp?: boolean } = {}) {
    super(EXIT.usage, message)
    this.seeHelp = seeHelp
  }
}

/** Whoever reads the output has gone (`| head`): nothing is wrong, and nobody is there to be told. */
export class ReaderGone extends Error {}

const BY_CODE: Partial<Record<BusErrorCode, number>> = {
  not_found: EXIT.absent,
  conflict: EXIT.taken,
  cas_conflict: EXIT.taken,
  lease_held: EXIT.taken,
  lease_lost: EXIT.lost,
  already_settled: EXIT.lost,
  timeout: EXIT.late,
  invalid_argument: EXIT.usage,
}

export function exitCodeOf(code: BusErrorCode): number {
  return BY_CODE[code] ?? EXIT.failed
}

/** Without loading the package, which may not have been needed. */
export function isBusFailure(error: unknown): error is BusError {
  return error instanceof Error && error.name === 'BusError' && 'code' in error
}

/** One line that is safe to show: what a server or a command said may hold several, and more than text. */
export function sentence(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error)
  const code = isBusFailure(error) ? ` [${error.code}]` : ''
  return `${printable(text.replaceAll(/\s*[\r\n]+\s*/g, ' ').trim())}${code}`
}

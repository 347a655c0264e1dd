/** Subjects and filters, as in NATS (P2): tokens joined by `.`; in a filter `*` is one token and a last `>` one or more. */

import { BusError } from './errors.ts'

export const MAX_SUBJECT_BYTES = 1024

// Printable ASCII without the dot and the wildcards. A wildcard inside a longer token (`a*`) is refused as well.
const TOKEN = /^[\x21-\x29\x2b-\x2d\x2f-\x3d\x3f-\x7e]+$/

function check(argument: string, value: unknown, wildcards: boolean): void {
  const fail = (rule: string) => new BusError('invalid_argument', `${argument} (${kindOf(value)}) ${rule}`)
  if (typeof value !== 'string') throw fail('must be a string')
  if (value.length === 0) throw fail('must not be empty')
  if (value.length > MAX_SUBJECT_BYTES) throw fail(`must be at most ${MAX_SUBJECT_BYTES} bytes long`)
  const tokens = value.split('.')
  const first = tokens[0] ?? ''
  if (first.startsWith('$') || first.startsWith('_INBOX')) throw fail('must not begin with a reserved token ($… or _INBOX…)')
  for (const [index, token] of tokens.entries()) {
    if (token === '') throw fail('must not hold an empty token')
    if (token === '*' || token === '>') {
      if (!wildcards) throw fail('must not hold a wildcard')
      if (token === '>' && index !== tokens.length - 1) throw fail('may hold ">" as its last token only')
    } else if (!TOKEN.test(token)) {
      throw fail('must be made of tokens of printable ASCII, without white space or wildcards inside a token')
    }
  }
}

/** How an error message names a bad value without repeating what may be secret or huge. */
export function kindOf(value: unknown): string {
  try {
    return kind(value)
  } catch {
    return 'an object that cannot be read'
  }
}

function kind(value: unknown): string {
  if (value === null) return 'null'
  if (typeof value === 'string') return `a string of length ${value.length}`
  if (typeof value === 'number') return `the number ${value}`
  if (value instanceof Date) return Number.isNaN(value.getTime()) ? 'an invalid date' : 'a date'
  if (Array.isArray(value)) return `an array of length ${value.length}`
  if (value instanceof Uint8Array) return `${value.byteLength} bytes`
  return value === undefined ? 'undefined' : typeof value === 'object' ? 'an object' : `a ${typeof value}`
}

/** @throws invalid_argument unless a message may be published there */
export function checkSubject(value: unknown, argument = 'subject'): asserts value is string {
  check(argument, value, false)
}

/** @throws invalid_argument unless it is a filter a durable, responder or watch may have */
export function checkFilter(value: unknown, argument = 'subject'): asserts value is string {
  check(argument, value, true)
}

export function hasWildcard(filter: string): boolean {
  return filter.split('.').some((token) => token === '*' || token === '>')
}

/** Whether a valid filter takes a valid subject. */
export function matches(filter: string, subject: string): boolean {
  if (filter === '>' || filter === subject) return true
  const wanted = filter.split('.')
  const tokens = subject.split('.')
  for (const [index, token] of wanted.entries()) {
    if (token === '>') return tokens.length > index
    if (index >= tokens.length) return false
    if (token !== '*' && token !== tokens[index]) return false
  }
  return tokens.length === wanted.length
}

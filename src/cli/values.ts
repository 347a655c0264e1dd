/** From what was typed to what is meant. */

import type { OptionSpec } from './command.ts'
import { UsageError } from './failure.ts'

const UNIT_MS: Readonly<Record<string, number>> = { ms: 1, s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000 }
const LONGEST_MS = 2_147_483_647

/** @param name for the message: `--ttl` */
export function typedValue(name: string, spec: OptionSpec, text: string): string | number | Date {
  switch (spec.type) {
    case 'integer':
      return integerOf(name, text, spec)
    case 'duration':
      return durationOf(name, text)
    case 'time':
      return timeOf(name, text)
    case 'command':
      // An empty one would succeed, and all jobs would be done.
      if (text.trim() === '') throw new UsageError(`${name} must not be empty`)
      return text
    default:
      if (spec.choices && !spec.choices.includes(text)) {
        throw new UsageError(`${name} is one of ${spec.choices.join(', ')}, not "${text}"`)
      }
      return text
  }
}

export function integerOf(name: string, text: string, { least, most }: { readonly least?: number; readonly most?: number }): number {
  const value = /^-?\d{1,16}$/.test(text) ? Number(text) : Number.NaN
  if (Number.isSafeInteger(value) && (least === undefined || value >= least) && (most === undefined || value <= most)) return value
  const range = least !== undefined && most !== undefined ? ` from ${least} to ${most}` : least !== undefined ? `, at least ${least}` : ''
  throw new UsageError(`${name} is an integer${range}, not "${text}"`)
}

export function durationOf(name: string, text: string): number {
  const [, count, unit] = /^(\d+(?:\.\d+)?)(ms|s|m|h|d)$/.exec(text) ?? []
  const ms = count === undefined ? Number.NaN : Math.round(Number(count) * UNIT_MS[unit!]!)
  if (!Number.isNaN(ms) && ms <= LONGEST_MS) return ms
  throw new UsageError(`${name} is a duration such as 500ms, 30s, 5m, 1h or 7d, 24d at the most, not "${text}"`)
}

export function timeOf(name: string, text: string): Date {
  // Without an offset it would be local time or UTC by the form of the text (ECMA-262, Date Time String Format).
  const isWhole = /^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:\d{2}))?$/.test(text)
  const time = new Date(text)
  if (isWhole && !Number.isNaN(time.getTime())) return time
  throw new UsageError(`${name} is a time such as 2026-01-31T12:00:00Z, or a day in UTC such as 2026-01-31, not "${text}"`)
}

export type Start = 'all' | 'new' | { readonly seq: number } | { readonly time: Date }

/** Where a durable begins: `all`, `new`, a message's number or a time. */
export function startOf(name: string, text: string): Start {
  if (text === 'all' || text === 'new') return text
  if (/^\d+$/.test(text)) return { seq: integerOf(name, text, { least: 0 }) }
  if (/^\d{4}-/.test(text)) return { time: timeOf(name, text) }
  throw new UsageError(`${name} is all, new, the number of a message, or a time such as 2026-01-31T12:00:00Z, not "${text}"`)
}

/** `name:value`, as in nats and curl; one space after the colon is not part of the value. */
export function headersOf(texts: readonly string[]): Record<string, string> | undefined {
  if (texts.length === 0) return undefined
  return Object.fromEntries(
    texts.map((text) => {
      const at = text.indexOf(':')
      if (at < 1) throw new UsageError(`--header is NAME:VALUE, not "${text}"`)
      return [text.slice(0, at), text.slice(at + 1).replace(/^ /, '')]
    }),
  )
}

/**
 * Why something does not match, in one line that may be logged, sent and kept as a header.
 *
 * A payload may be secret, and the messages of validators quote it ("must be positive (was -5)", "Expected number but received "abc""). So of an
 * issue only the path is used, and what the schema wanted there: zod, valibot and arktype say so in fields of their own, `expected`, `code`
 * and `type`, which they take from the schema. Others say nothing more than that it does not match. A path is made of the names of fields, and so of
 * the keys of a record.
 */

import type { StandardSchemaV1 } from '@standard-schema/spec'

/** What to say of one issue, beside its path. */
export type Explain = (issue: StandardSchemaV1.Issue) => string

/** A header's value; with what is put before it, within 4,000 characters. */
const LONGEST = 3_900
const MOST_ISSUES = 8
const LONGEST_KEY = 64
const LONGEST_PHRASE = 200

/** Never throws: an issue that cannot be read is one that does not match. */
export function reasonOf(issues: readonly StandardSchemaV1.Issue[], explain: Explain | undefined): string {
  try {
    const told = issues.slice(0, MOST_ISSUES).map((issue) => describe(issue, explain))
    const more = issues.length - told.length
    return oneLine([...told, ...(more > 0 ? [`and ${more} more`] : [])].join('; '), LONGEST) || UNKNOWN
  } catch {
    return UNKNOWN
  }
}

const UNKNOWN = 'it does not match'

/** Within `longest` characters, well-formed and without control characters. */
export function oneLine(text: string, longest: number): string {
  return text
    .slice(0, longest)
    .replaceAll(/[\p{Cc}\u2028\u2029]+/gu, ' ')
    .toWellFormed()
    .trim()
}

function describe(issue: StandardSchemaV1.Issue, explain: Explain | undefined): string {
  const path = pathOf(issue.path ?? [])
  const phrase = explain ? String(explain(issue)) : expectation(issue)
  return path === '' ? phrase : `${path}: ${phrase}`
}

function expectation(issue: object): string {
  const { expected, code, type } = issue as { readonly expected?: unknown; readonly code?: unknown; readonly type?: unknown }
  if (typeof expected === 'string' && expected !== '') return `expected ${expected.slice(0, LONGEST_PHRASE)}`
  const name = [code, type].find((value) => typeof value === 'string' && /^[\w.-]{1,64}$/.test(value))
  return name === undefined ? UNKNOWN : String(name)
}

/** `items[0].price` */
function pathOf(path: NonNullable<StandardSchemaV1.Issue['path']>): string {
  let text = ''
  for (const segment of path) {
    const key = typeof segment === 'object' ? segment.key : segment
    if (typeof key === 'number') text += `[${key}]`
    else {
      const name = String(key)
      const cut = name.length > LONGEST_KEY ? `${name.slice(0, LONGEST_KEY)}…` : name
      text += /^[\w$-]+$/.test(name) ? `${text === '' ? '' : '.'}${cut}` : `[${JSON.stringify(cut)}]`
    }
  }
  return text
}

/**
 * Why something does not match, in one line that may be logged, sent and kept as a header.
 *
 * A payload may be secret, and the messages of validators quote it ("must be positive (was -5)", "Expected number but received "abc""). So of an
 * issue only the path is used, and what the schema wanted there: zod, valibot and arktype say so in fields of their own, `expected`, `code`
 * and `type`, which they take from the schema. Others say nothing more than that it does not match. A path is made of the names of fields, and so of
 * the keys of a record.
 */

import type { StandardSchemaV1 } from '@standard-schema/spec'
import { oneLine } from '../runtime/error-text.ts'

/** What the reason of a dead letter begins with. */
export const INVALID_PAYLOAD = 'invalid_payload'

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

/** The fields of their own that validators give an issue. */
interface Issue extends Pick<StandardSchemaV1.Issue, 'path'> {
  readonly expected?: unknown
  readonly code?: unknown
  readonly type?: unknown
  /** arktype's, of the branches of a union or an intersection. */
  readonly errors?: unknown
}

function describe(issue: StandardSchemaV1.Issue, explain: Explain | undefined): string {
  const path = pathOf(issue.path ?? [])
  const phrase = explain ? String(explain(issue)) : expectation(issue)
  return path === '' ? phrase : `${path}: ${phrase}`
}

function expectation(issue: Issue): string {
  const wanted = wantedBy(issue)
  if (wanted !== undefined && wanted !== '') return `expected ${wanted.slice(0, LONGEST_PHRASE)}`
  const name = [issue.code, issue.type].find((value) => typeof value === 'string' && /^[\w.-]{1,64}$/.test(value))
  return name === undefined ? UNKNOWN : String(name)
}

/** What arktype says of several branches together quotes the value: each is asked for itself. */
function wantedBy({ code, expected, errors, path = [] }: Issue): string | undefined {
  if ((code !== 'union' && code !== 'intersection') || !Array.isArray(errors)) return typeof expected === 'string' ? expected : undefined
  const here = pathOf(path)
  const wanted = (errors as Issue[]).slice(0, MOST_ISSUES).map((branch) => {
    const there = pathOf(branch.path ?? [])
    return `${wantedBy(branch) ?? UNKNOWN}${there === here ? '' : ` at ${there}`}`
  })
  return [...new Set(wanted)].join(code === 'union' ? ' or ' : ' and ')
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

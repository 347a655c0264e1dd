/**
 * What a step was seen to do, and whether two worlds saw the same. Numbers that a backend makes up (seqs, revisions, fences, job ids)
 * are compared by what they stand for: the one of here always goes with the same one there, and where one is larger here it is
 * larger there.
 */

export class Ref {
  readonly scope: string
  readonly value: number | string
  readonly ordered: boolean

  /** @param ordered its order among those of its scope is promised */
  constructor(scope: string, value: number | string, ordered = true) {
    this.scope = scope
    this.value = value
    this.ordered = ordered
  }

  toJSON(): string {
    return `${this.scope} ${this.value}`
  }
}

export type Seen = null | boolean | number | string | undefined | Ref | readonly Seen[] | { readonly [name: string]: Seen }

interface Pair {
  readonly a: number | string
  readonly b: number | string
  readonly ordered: boolean
}

export class Comparison {
  readonly #pairs = new Map<string, Pair[]>()

  /** Where they differ, in words; `undefined`: they do not. */
  difference(a: Seen, b: Seen, path = ''): string | undefined {
    if (a instanceof Ref && b instanceof Ref) {
      const why = a.scope === b.scope ? this.#differs(a, b) : 'of another kind'
      return why === undefined ? undefined : `${path}: ${JSON.stringify(a)} and ${JSON.stringify(b)}: ${why}`
    }
    if (Array.isArray(a) && Array.isArray(b) && a.length === b.length)
      return first(a, (one, index) => this.difference(one, b[index], `${path}[${index}]`))
    if (isRecord(a) && isRecord(b)) {
      const names = [...new Set([...Object.keys(a), ...Object.keys(b)])]
      return first(names, (name) => this.difference(a[name], b[name], `${path}.${name}`))
    }
    return a === b ? undefined : `${path}: ${JSON.stringify(a)} and ${JSON.stringify(b)}`
  }

  #differs({ scope, value: a, ordered }: Ref, { value: b }: Ref): string | undefined {
    const pairs = this.#pairs.get(scope) ?? []
    this.#pairs.set(scope, pairs)
    for (const pair of pairs) {
      if ((pair.a === a) !== (pair.b === b)) return `before, ${pair.a} went with ${pair.b}`
      if (pair.a === a) return undefined
      if (ordered && pair.ordered && pair.a < a !== pair.b < b) return `not in the order of ${pair.a} and ${pair.b}`
    }
    pairs.push({ a, b, ordered })
    return undefined
  }
}

function first<T>(items: readonly T[], find: (item: T, index: number) => string | undefined): string | undefined {
  for (const [index, item] of items.entries()) {
    const found = find(item, index)
    if (found !== undefined) return found
  }
  return undefined
}

function isRecord(value: Seen): value is { readonly [name: string]: Seen } {
  return typeof value === 'object' && value !== null && !Array.isArray(value) && !(value instanceof Ref)
}

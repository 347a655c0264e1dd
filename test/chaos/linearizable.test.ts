import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { linearizable, type Register } from './checker/linearizable.ts'
import { caught, type Invented } from './invented.ts'
import { bruteForce, corrupt, simulate } from './invented-keys.ts'

const EMPTY: Register = { writes: [], reads: [], deletions: [], maybeDeleted: [], maybeWritten: [], phantoms: [] }
const accepts = (register: Partial<Register>) => linearizable({ ...EMPTY, ...register }).ok
const span = (from: number, to: number) => ({ from, to, what: `${from}..${to}` })
const write = (revision: number, from: number, to: number, expected?: number | null) => ({
  ...span(from, to),
  revision,
  ...(expected === undefined ? {} : { expected }),
})
const read = (revision: number | null, from: number, to: number) => ({ ...span(from, to), revision })

describe('histories of one key', () => {
  test('K4 a read sees what had been written before it', () => {
    expect(accepts({ writes: [write(1, 0, 1), write(2, 2, 3)], reads: [read(2, 4, 5)] })).toBe(true)
    expect(accepts({ writes: [write(1, 0, 1), write(2, 2, 3)], reads: [read(1, 4, 5)] })).toBe(false)
    expect(accepts({ writes: [write(1, 0, 1), write(2, 2, 5)], reads: [read(1, 4, 5)] })).toBe(true)
  })

  test('K4 two reads, one after the other, do not see time run backwards', () => {
    const writes = [write(1, 0, 1), write(2, 2, 9)]
    expect(accepts({ writes, reads: [read(1, 3, 4), read(2, 5, 6)] })).toBe(true)
    expect(accepts({ writes, reads: [read(2, 3, 4), read(1, 5, 6)] })).toBe(false)
    expect(accepts({ writes, reads: [read(2, 3, 6), read(1, 5, 7)] })).toBe(true)
  })

  test('K1 a later write has a greater revision', () => {
    expect(accepts({ writes: [write(2, 0, 1), write(1, 2, 3)] })).toBe(false)
    expect(accepts({ writes: [write(2, 0, 3), write(1, 2, 3)] })).toBe(true)
    expect(accepts({ writes: [write(1, 0, 1), write(1, 2, 3)] })).toBe(false)
  })

  test('K2 a cas succeeds only at the revision it expects', () => {
    expect(accepts({ writes: [write(1, 0, 1, null), write(2, 2, 3, 1)] })).toBe(true)
    expect(accepts({ writes: [write(1, 0, 1, null), write(2, 2, 3, null)] })).toBe(false)
    // A lost update: both expected revision 1.
    expect(accepts({ writes: [write(1, 0, 1), write(2, 2, 9, 1), write(3, 2, 9, 1)] })).toBe(false)
  })

  test('K3 after a deletion a key is absent until it is written', () => {
    const writes = [write(1, 0, 1)]
    const deletions = [span(2, 3)]
    expect(accepts({ writes, deletions, reads: [read(null, 4, 5)] })).toBe(true)
    expect(accepts({ writes, deletions, reads: [read(1, 4, 5)] })).toBe(false)
    expect(accepts({ writes, reads: [read(null, 4, 5)] })).toBe(false)
    expect(accepts({ writes: [...writes, write(2, 4, 5, null)], deletions })).toBe(true)
    expect(accepts({ writes: [...writes, write(2, 4, 5, 1)], deletions })).toBe(false)
  })

  test('K3 a deletion of what is absent does nothing', () => {
    expect(accepts({ deletions: [span(0, 1)], writes: [write(1, 2, 3)], reads: [read(1, 4, 5)] })).toBe(true)
    // Two deletions side by side with a write between the reads of absence: one of each.
    const writes = [write(1, 0, 1), write(2, 6, 7)]
    expect(accepts({ writes, deletions: [span(2, 20), span(2, 20)], reads: [read(null, 4, 5), read(null, 8, 9)] })).toBe(true)
    expect(accepts({ writes, deletions: [span(2, 20)], reads: [read(null, 4, 5), read(null, 8, 9)] })).toBe(false)
  })

  test('K3 a conditional deletion happens at its revision, once', () => {
    const writes = [write(1, 0, 1), write(2, 2, 3)]
    const deletion = (expected: number) => ({ ...span(4, 5), expected })
    expect(accepts({ writes, deletions: [deletion(2)], reads: [read(null, 6, 7)] })).toBe(true)
    expect(accepts({ writes, deletions: [deletion(1)] })).toBe(false)
    expect(accepts({ writes, deletions: [deletion(2), deletion(2)] })).toBe(false)
    expect(accepts({ writes, deletions: [deletion(3)] })).toBe(false)
  })

  test('a deletion of unknown fate may have happened at any time after its call, once', () => {
    const writes = [write(1, 0, 1), write(2, 20, 21)]
    expect(accepts({ writes, maybeDeleted: [{ from: 2 }], reads: [read(1, 9, 10), read(null, 11, 12)] })).toBe(true)
    expect(accepts({ writes, maybeDeleted: [{ from: 13 }], reads: [read(null, 11, 12)] })).toBe(false)
    expect(accepts({ writes, maybeDeleted: [{ from: 2 }], reads: [read(null, 11, 12), read(null, 22, 23)] })).toBe(false)
    expect(accepts({ writes, maybeDeleted: [{ from: 2 }, { from: 3 }], reads: [read(null, 11, 12), read(null, 22, 23)] })).toBe(true)
    expect(
      accepts({ writes, maybeDeleted: [{ from: 2, expected: 1 }, { from: 3 }], reads: [read(null, 11, 12), read(null, 22, 23)] }),
    ).toBe(true)
    expect(accepts({ writes, maybeDeleted: [{ from: 2, expected: 1 }], reads: [read(null, 22, 23)] })).toBe(false)
  })

  test('a revision that nobody was answered needs a write of unknown fate that could have made it', () => {
    const writes = [write(1, 0, 1), write(9, 20, 21, 5)]
    expect(accepts({ writes, phantoms: [5] })).toBe(false)
    expect(accepts({ writes, phantoms: [5], maybeWritten: [{ from: 2 }] })).toBe(true)
    expect(accepts({ writes, phantoms: [5], maybeWritten: [{ from: 22 }] })).toBe(false)
    expect(accepts({ writes, phantoms: [5], maybeWritten: [{ from: 2, expected: 1 }] })).toBe(true)
    expect(accepts({ writes, phantoms: [5], maybeWritten: [{ from: 2, expected: 7 }] })).toBe(false)
    expect(accepts({ writes, phantoms: [5], maybeWritten: [{ from: 2, expected: null }] })).toBe(false)
    expect(accepts({ writes, phantoms: [5], maybeWritten: [{ from: 2, expected: null }], maybeDeleted: [{ from: 3 }] })).toBe(true)
    expect(accepts({ writes: [...writes, write(11, 30, 31, 10)], phantoms: [5, 10], maybeWritten: [{ from: 2 }] })).toBe(false)
  })

  test('a deletion in a transaction is with its commit, or did nothing when it was made', () => {
    const deletion = { ...span(10, 11), at: { from: 2, to: 3 } }
    // It found nothing at 2..3; what was written since stays.
    expect(accepts({ deletions: [deletion], writes: [write(1, 4, 5)], reads: [read(1, 12, 13)] })).toBe(true)
    expect(accepts({ deletions: [deletion], writes: [write(1, 0, 1)], reads: [read(1, 12, 13)] })).toBe(false)
    expect(accepts({ deletions: [deletion], writes: [write(1, 0, 1)], reads: [read(1, 8, 9), read(null, 12, 13)] })).toBe(true)
    expect(accepts({ deletions: [deletion], writes: [write(1, 0, 1)], reads: [read(null, 8, 9)] })).toBe(false)
  })

  test('a write that is deleted in the same transaction is seen by nobody', () => {
    const gone = { ...write(2, 2, 3), leavesAbsent: true }
    expect(accepts({ writes: [write(1, 0, 1), gone], reads: [read(null, 4, 5)] })).toBe(true)
    expect(accepts({ writes: [write(1, 0, 1), gone], reads: [read(2, 4, 5)] })).toBe(false)
    expect(accepts({ writes: [write(1, 0, 1), gone], reads: [read(1, 4, 5)] })).toBe(false)
  })
})

describe('invented histories', () => {
  test('K1 K2 K3 K4 what a register answered is accepted, whatever the calls overlap and whatever is lost', () => {
    fc.assert(
      fc.property(fc.integer(), fc.integer({ min: 1, max: 120 }), (seed, calls) => {
        const verdict = linearizable(simulate(seed, calls))
        if (!verdict.ok) throw new Error(`${verdict.why}: ${verdict.stuck.join('; ')}`)
      }),
      { numRuns: 1_000 },
    )
  })

  for (const fault of ['lost update', 'stale read', 'resurrected value', 'reused revision'] as const) {
    test(`K1 K2 K3 K4 the same with one ${fault} is refused`, () => {
      let made = 0
      fc.assert(
        fc.property(fc.integer(), fc.integer({ min: 5, max: 120 }), (seed, calls) => {
          const register = corrupt(simulate(seed, calls), fault, seed)
          fc.pre(register !== undefined)
          made++
          expect(linearizable(register as Register).ok).toBe(false)
        }),
        { numRuns: 300 },
      )
      expect(made).toBeGreaterThan(200)
    })
  }

  test('the search agrees with trying every order', () => {
    const verdicts = { true: 0, false: 0 }
    fc.assert(
      fc.property(fc.integer(), fc.integer({ min: 1, max: 7 }), fc.integer({ min: 0, max: 3 }), (seed, calls, changes) => {
        const register = simulate(seed, calls, changes)
        const expected = bruteForce(register)
        verdicts[`${expected}`]++
        expect(linearizable(register).ok).toBe(expected)
      }),
      { numRuns: 4_000 },
    )
    expect(Math.min(verdicts.true, verdicts.false)).toBeGreaterThan(200)
  })

  test('a history of 20,000 calls with hundreds of unknown fates is searched in seconds', () => {
    const register = simulate(7, 20_000)
    expect(register.maybeDeleted.length).toBeGreaterThan(100)
    expect(linearizable(register).ok).toBe(true)
  }, 60_000)
})

describe('keys', () => {
  const RULE = 'kv: one register a key'
  const put = (record: Invented, value: string, revision: number, from: number, to: number, tx?: string) =>
    record.call({ do: 'put', key: 'k', value, ...(tx === undefined ? {} : { tx }) }, from, to, { ok: { revision } })
  const get = (record: Invented, value: string | null, revision: number | null, from: number, to: number) =>
    record.call({ do: 'get', key: 'k' }, from, to, { ok: { value, revision } })
  const left = (record: Invented, value: string, revision: number) => record.final.entries.push({ key: 'k', value, revision })

  caught('K4 an entry at the end that is not the last write', RULE, (record, breaks) => {
    put(record, 'v1', 1, 0, 1)
    put(record, 'v2', 2, 2, 3)
    if (breaks) left(record, 'v1', 1)
    else left(record, 'v2', 2)
  })

  caught('K4 a key that is absent at the end', RULE, (record, breaks) => {
    put(record, 'v1', 1, 0, 1)
    if (breaks) return
    record.call({ do: 'delete', key: 'k' }, 2, 3, { err: 'connection' })
  })

  caught('K4 a key at the end that nobody wrote', RULE, (record, breaks) => {
    put(record, 'v1', 1, 0, 1)
    left(record, 'v1', 1)
    if (breaks) record.final.entries.push({ key: 'x', value: 'v', revision: 2 })
  })

  caught('K1 a revision with two values', RULE, (record, breaks) => {
    put(record, 'v1', 1, 0, 9)
    record.call({ do: 'put', key: 'k', value: 'v2' }, 0, 9, { err: 'connection' })
    get(record, breaks ? 'v2' : 'v1', 1, 3, 4)
    left(record, 'v1', 1)
  })

  caught('K1 a value that nobody wrote', RULE, (record, breaks) => {
    record.call({ do: 'put', key: 'k', value: 'v1' }, 0, 1, { err: 'connection' })
    get(record, breaks ? 'v2' : 'v1', 1, 3, 4)
    left(record, breaks ? 'v2' : 'v1', 1)
  })

  caught('K1 a value that was rolled back and read', RULE, (record, breaks) => {
    put(record, 'v1', 1, 0, 1, 't')
    record.call({ do: breaks ? 'rollback' : 'commit', tx: 't' }, 2, 3)
    get(record, 'v1', 1, 3, 4)
    left(record, 'v1', 1)
  })

  caught('P1 a value that was read before the commit of its transaction', RULE, (record, breaks) => {
    put(record, 'v1', 1, 0, 1, 't')
    if (breaks) get(record, 'v1', 1, 2, 3)
    else get(record, null, null, 2, 3)
    record.call({ do: 'commit', tx: 't' }, 4, 5)
    left(record, 'v1', 1)
  })

  caught('P1 one of two keys of a transaction whose commit nobody answered', RULE, (record, breaks) => {
    put(record, 'v1', 1, 0, 1, 't')
    record.call({ do: 'put', key: 'l', value: 'v2', tx: 't' }, 0, 1, { ok: { revision: 2 } })
    record.call({ do: 'commit', tx: 't' }, 4, 5, { err: 'sql:08006' })
    left(record, 'v1', 1)
    if (!breaks) record.final.entries.push({ key: 'l', value: 'v2', revision: 2 })
  })

  caught('K2 a cas that was refused for what had gone long before', RULE, (record, breaks) => {
    put(record, 'v1', 1, 0, 1)
    put(record, 'v2', 2, 2, 3)
    record.call({ do: 'cas', key: 'k', value: 'v3', expected: 7 }, 4, 5, { err: 'cas_conflict', actual: breaks ? 1 : 2 })
    left(record, 'v2', 2)
  })

  caught('K2 a cas that was refused for what it expected', RULE, (record, breaks) => {
    put(record, 'v1', 1, 0, 1)
    record.call({ do: 'cas', key: 'k', value: 'v3', expected: breaks ? 1 : 7 }, 4, 5, { err: 'cas_conflict', actual: 1 })
    left(record, 'v1', 1)
  })

  caught('K2 a cas in a transaction that others wrote through', RULE, (record, breaks) => {
    put(record, 'v1', 1, 0, 1)
    record.call({ do: 'cas', key: 'k', value: 'v2', expected: 1, tx: 't' }, 2, 3, { ok: { revision: 2 } })
    if (breaks) put(record, 'v3', 3, 4, 5)
    record.call({ do: 'commit', tx: 't' }, 6, 7)
    if (!breaks) put(record, 'v3', 3, 4, 8)
    left(record, breaks ? 'v2' : 'v3', breaks ? 2 : 3)
  })

  caught('K1 two writes of one transaction whose revisions fall', RULE, (record, breaks) => {
    put(record, 'v1', breaks ? 2 : 1, 0, 1, 't')
    put(record, 'v2', breaks ? 1 : 2, 2, 3, 't')
    record.call({ do: 'commit', tx: 't' }, 4, 5)
    left(record, 'v2', breaks ? 1 : 2)
  })
})

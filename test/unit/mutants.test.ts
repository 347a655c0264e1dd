import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { mutants } from '../mutants/catalogue/index.ts'
import { cites, judge, type TestResult } from '../mutants/judge.ts'
import { applyEdit, type Mutant, mutate } from '../mutants/mutant.ts'
import { ROOT, readSource } from '../mutants/tree.ts'

const SUITE = 'src/testing/conformance'

/** What the tests of a file are named in: those of the conformance suite stand in its own files. */
function namesIn(file: string): string {
  const suite = file.startsWith('test/conformance/') ? readdirSync(join(ROOT, SUITE)).map((name) => `${SUITE}/${name}`) : []
  return [file, ...suite].map((path) => readFileSync(join(ROOT, path), 'utf8')).join('\n')
}

describe('the mutants', () => {
  test.each(mutants.map((mutant) => [mutant.id, mutant] as const))('%s still applies to the source', (_, mutant) => {
    for (const [file, text] of mutate(mutant, readSource)) expect(text).not.toBe(readSource(file))
  })

  test.each(mutants.map((mutant) => [mutant.id, mutant] as const))('%s names tests that there are', (_, { files, caughtBy, beside }) => {
    for (const file of files) expect(existsSync(join(ROOT, file)), file).toBe(true)
    const names = files.map(namesIn).join('\n')
    for (const name of [...caughtBy, ...beside]) expect(names.includes(name), `a test whose name holds “${name}”`).toBe(true)
  })

  test('each has a name of its own', () => {
    const ids = mutants.map(({ id }) => id)
    expect(new Set(ids).size).toBe(ids.length)
  })
})

describe('an edit', () => {
  test('is made where its text stands', () => {
    expect(applyEdit('a b c', { file: 'f', find: 'b', replace: 'x$&' })).toBe('a x$& c')
  })

  test('fails when its text is gone, or stands there more than once', () => {
    expect(() => applyEdit('a c', { file: 'f', find: 'b', replace: 'x' })).toThrow(/f does not hold/)
    expect(() => applyEdit('b b', { file: 'f', find: 'b', replace: 'x' })).toThrow(/f holds .* more than once/)
    expect(() => applyEdit('b', { file: 'f', find: 'b', replace: 'b' })).toThrow(/changes nothing/)
  })
})

describe('the verdict', () => {
  const mutant: Mutant = {
    id: 'm',
    rule: 'P7',
    guarantee: '',
    broken: '',
    edits: [],
    files: ['f'],
    caughtBy: ['is refused'],
    beside: ['goes on'],
  }
  const result = (name: string, state: TestResult['state'], failure = ''): TestResult => ({ file: 'f', name, state, ms: 1, failure })
  const before = [result('group P7 it is refused', 'passed'), result('P5 it goes on', 'passed')]
  const verdict = (...after: TestResult[]) => judge(mutant, before, after).verdict

  test('caught: the test failed by what it asserts, and another one passed', () => {
    const judgement = judge(mutant, before, [
      result('group P7 it is refused', 'failed', 'expected 1 to be 2'),
      result('P5 it goes on', 'passed'),
    ])
    expect(judgement).toMatchObject({ verdict: 'caught', by: ['group P7 it is refused'] })
  })

  test('survived: the test passed, whatever else failed', () => {
    expect(verdict(result('group P7 it is refused', 'passed'), result('P5 it goes on', 'passed'))).toBe('survived')
    expect(verdict(result('group P7 it is refused', 'passed'), result('P5 it goes on', 'failed', 'expected 1 to be 2'))).toBe('survived')
  })

  test('broken: every test failed, or the test failed for a reason that is no guarantee', () => {
    const failed = result('P5 it goes on', 'failed', 'expected 1 to be 2')
    expect(verdict(result('group P7 it is refused', 'failed', 'expected 1 to be 2'), failed)).toBe('broken')
    for (const failure of ['SyntaxError: Unexpected token', 'migrate schema "x": unexpected error', 'Test timed out in 30000ms.']) {
      expect(verdict(result('group P7 it is refused', 'failed', failure), result('P5 it goes on', 'passed'))).toBe('broken')
    }
    expect(verdict()).toBe('broken')
  })

  test('broken: the test does not cite the rule, or is not there', () => {
    const other = [result('P8 it is refused', 'failed', 'expected 1 to be 2'), result('P5 it goes on', 'passed')]
    expect(judge(mutant, other, other).verdict).toBe('broken')
    expect(judge(mutant, [result('P5 it goes on', 'passed')], []).verdict).toBe('broken')
  })

  test('broken: a test fails on the unmutated tree as well', () => {
    const failing = [result('P7 it is refused', 'failed', 'expected 1 to be 2'), result('P5 it goes on', 'passed')]
    expect(judge(mutant, failing, failing).verdict).toBe('broken')
  })

  test('skipped: so the unmutated tree says', () => {
    expect(judge(mutant, [result('P7 it is refused', 'skipped')], []).verdict).toBe('skipped')
  })

  test('a name cites the rules it begins with', () => {
    expect(cites('J3 and J6 with plain acks', 'J6')).toBe(true)
    expect(cites('J1, J2, J3 and J6 workers', 'J2')).toBe(true)
    expect(cites('group section 7 in the caller', 'section 7')).toBe(true)
    expect(cites('P14 it is', 'P1')).toBe(false)
  })
})

/**
 * What a run of the tests says about a mutant.
 *
 *   caught     a test that is to catch it failed by what it asserts, and others went on passing
 *   survived   none of those did: a hole in the tests
 *   broken     nothing can be said: it did not run, or nothing works any more, or it failed for another reason than a guarantee,
 *              or it fails on the unmutated tree as well
 *   skipped    this machine lacks what the tests need (the unmutated tree skips them, too)
 */

import type { Mutant } from './mutant.ts'

export interface TestResult {
  readonly file: string
  /** With the names of the groups it is in. */
  readonly name: string
  readonly state: 'passed' | 'failed' | 'skipped'
  readonly ms: number
  /** Of a failed one: the messages. */
  readonly failure: string
}

export interface Judgement {
  readonly verdict: 'caught' | 'survived' | 'broken' | 'skipped'
  /** The tests that caught it. */
  readonly by: readonly string[]
  /** Others that failed. */
  readonly also: readonly string[]
  /** Where it was not caught. */
  readonly why: string
}

/** An edit that is no program, or no schema, any more; or a test that ran out of time before it could say what it missed. */
const NO_ASSERTION =
  /SyntaxError|ReferenceError|is not a function|is not iterable|Cannot find (module|package)|does not provide an export|syntax error at|(column|function|relation|operator) .* does not exist|migrate schema|(Test|Hook) timed out/

/**
 * @param before the same tests on the unmutated tree
 * @param after the tests on the mutant
 */
export function judge(mutant: Mutant, before: readonly TestResult[], after: readonly TestResult[]): Judgement {
  const catchers = before.filter(({ name }) => mutant.caughtBy.some((part) => name.includes(part)))
  const nothing = { by: [], also: [] }
  if (catchers.length === 0) return { ...nothing, verdict: 'broken', why: 'no test has any of the names that are to catch it' }
  if (catchers.every(({ state }) => state === 'skipped')) {
    return { ...nothing, verdict: 'skipped', why: 'its tests are skipped on this machine' }
  }
  // What fails anyway shows nothing.
  const sound = new Set(catchers.filter(({ state }) => state === 'passed').map(({ name }) => name))
  if (sound.size === 0)
    return { ...nothing, verdict: 'broken', why: 'void: the tests that are to catch it fail on the unmutated tree, too' }
  const isCatcher = ({ name }: TestResult) => sound.has(name)
  const ran = after.filter(({ state }) => state !== 'skipped')
  if (ran.length === 0) return { ...nothing, verdict: 'broken', why: 'no test ran: the tests could not be loaded' }
  if (!ran.some(isCatcher)) return { ...nothing, verdict: 'broken', why: 'the tests that are to catch it did not run' }
  const failed = ran.filter(({ state }) => state === 'failed')
  const asserted = failed.filter((test) => isCatcher(test) && cites(test.name, mutant.rule) && !NO_ASSERTION.test(test.failure))
  const by = asserted.map(({ name }) => name)
  const also = failed.filter((test) => !asserted.includes(test)).map(({ name }) => name)
  if (failed.length === ran.length) return { by: [], also: [...by, ...also], verdict: 'broken', why: `every test failed: ${first(failed)}` }
  if (by.length > 0) return { by, also, verdict: 'caught', why: '' }
  const odd = failed.find((test) => isCatcher(test))
  if (odd) return { by, also, verdict: 'broken', why: `the test failed, but not by an assertion for ${mutant.rule}: ${first([odd])}` }
  return {
    by,
    also,
    verdict: 'survived',
    why: `passed: ${ran
      .filter(isCatcher)
      .map(({ name }) => name)
      .join('; ')}`,
  }
}

/** Whether the name of a test has the rule among those it begins with, or in the middle ("J3 and J6 …"). */
export function cites(name: string, rule: string): boolean {
  return new RegExp(`(^|[ ,])${rule}(?![A-Za-z0-9])`).test(name)
}

function first(failed: readonly TestResult[]): string {
  return (failed[0]?.failure ?? '').split('\n', 1)[0]?.slice(0, 200) ?? ''
}

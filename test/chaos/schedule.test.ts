import { expect, test } from 'vitest'
import { Dice } from './dice.ts'
import { FAULT_KINDS, schedule } from './schedule.ts'

const MINUTE = 60_000

test('a seed repeats its faults: when, which, to whom and for how long', () => {
  expect(schedule('7', 10 * MINUTE)).toEqual(schedule('7', 10 * MINUTE))
  expect(schedule('7', 10 * MINUTE)).not.toEqual(schedule('8', 10 * MINUTE))
})

test('a longer run begins with the faults of a shorter one', () => {
  const short = schedule('7', MINUTE)
  expect(schedule('7', 10 * MINUTE).slice(0, short.length)).toEqual(short)
})

test.each(['1', '2', '3', '4', '5', '6', '7', '8'])('in a minute (seed %s) every kind of fault happens', (seed) => {
  const faults = schedule(seed, MINUTE)
  expect(new Set(faults.map(({ kind }) => kind))).toEqual(new Set(FAULT_KINDS))
  expect(faults.length).toBeLessThan(60)
})

test('the server is not hit again before it could be used', () => {
  const hits = schedule('9', 30 * MINUTE).filter(({ kind }) => kind === 'serverKill' || kind === 'serverRestart')
  expect(hits.length).toBeGreaterThan(30)
  for (const [n, { atMs }] of hits.entries()) if (n > 0) expect(atMs - hits[n - 1]!.atMs).toBeGreaterThanOrEqual(15_000)
})

test('logical clients throw dice of their own, which a seed repeats', () => {
  const throws = (seed: string) => {
    const dice = new Dice(seed)
    return Array.from({ length: 20 }, () => dice.between(1, 1_000))
  }
  expect(throws('1 publisher-1 1 c1')).toEqual(throws('1 publisher-1 1 c1'))
  expect(throws('1 publisher-1 1 c1')).not.toEqual(throws('1 publisher-1 1 c2'))
  expect(throws('1 publisher-1 1 c1')[0]).not.toBe(throws('1 publisher-1 2 c1')[0])
})

test('weights are shares', () => {
  const dice = new Dice('weights')
  const counts = { often: 0, seldom: 0, never: 0 }
  for (let n = 0; n < 10_000; n++) counts[dice.weighted({ often: 9, seldom: 1, never: 0 })]++
  expect(counts.never).toBe(0)
  expect(counts.often / counts.seldom).toBeGreaterThan(7)
  expect(counts.often / counts.seldom).toBeLessThan(11)
})

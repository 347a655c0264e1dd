import { expect, test } from 'vitest'
import { MemoryBus } from '../../src/memory/index.ts'
import { conformance } from '../../src/testing/conformance/index.ts'

const RULES = [
  ...Array.from({ length: 14 }, (_, n) => `P${n + 1}`),
  ...Array.from({ length: 4 }, (_, n) => `R${n + 1}`),
  ...Array.from({ length: 6 }, (_, n) => `K${n + 1}`),
  ...Array.from({ length: 8 }, (_, n) => `J${n + 1}`),
]

test('every rule of the contract is cited by a conformance test', () => {
  const names: string[] = []
  const collect = Object.assign((name: string) => void names.push(name), { skip: (name: string) => void names.push(name) })
  const bus = MemoryBus.create()
  conformance(
    { describe: (_name, define) => define(), test: collect },
    { name: 'nobody', supports: { ...bus.supports, transactions: true }, connect: async () => MemoryBus.create() },
  )
  expect(RULES.filter((rule) => !names.some((name) => new RegExp(`\\b${rule}\\b`).test(name)))).toEqual([])
})

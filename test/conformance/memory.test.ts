import { describe, test } from 'vitest'
import { MemoryBus, MemoryStore } from '../../src/memory/index.ts'
import { conformance } from '../../src/testing/conformance/index.ts'

const store = new MemoryStore()

conformance(
  { describe, test },
  {
    name: 'MemoryBus',
    supports: MemoryBus.create().supports,
    connect: async (options) => MemoryBus.create({ store, ...options }),
  },
)

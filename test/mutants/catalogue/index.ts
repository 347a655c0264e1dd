import type { Mutant } from '../mutant.ts'
import { adminMutants } from './admin.ts'
import { bridgeMutants } from './bridge.ts'
import { callMutants } from './calls.ts'
import { contractMutants } from './contracts.ts'
import { deliveryMutants } from './deliveries.ts'
import { foreignMutants } from './foreign.ts'
import { jobMutants } from './jobs.ts'
import { keyMutants } from './keys.ts'
import { logMutants } from './log.ts'
import { memoryMutants } from './memory.ts'

export const mutants: readonly Mutant[] = [
  ...logMutants,
  ...deliveryMutants,
  ...jobMutants,
  ...keyMutants,
  ...callMutants,
  ...adminMutants,
  ...foreignMutants,
  ...memoryMutants,
  ...contractMutants,
  ...bridgeMutants,
]

import type { LockedPackage } from './packages.ts'

/** What the rolled-back transaction writes; the report looks for it. */
export const NEVER_COMMITTED: LockedPackage = { path: 'node_modules/never-committed', name: 'never-committed', version: '0.0.0' }

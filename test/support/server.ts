/** The server that all test files share. Every file works in schemas of its own and leaves the others alone. */

import { randomBytes } from 'node:crypto'
import { inject } from 'vitest'

declare module 'vitest' {
  interface ProvidedContext {
    /** See global-setup.ts. */
    readonly databaseUrl: string
    /** What the schemas of this run begin with. */
    readonly schemaPrefix: string
  }
}

/** A superuser's, unless DATABASE_URL says otherwise. */
export function databaseUrl(): string {
  return inject('databaseUrl')
}

/** The name of a schema that does not exist yet. The end of the run drops it. */
export function freshSchema(): string {
  return `${inject('schemaPrefix')}${randomBytes(6).toString('hex')}`
}

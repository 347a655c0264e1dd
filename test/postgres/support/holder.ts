/** The parent's side of holder-child.ts. */

import { type Child, startChild } from '../../support/child.ts'
import type { Command } from './holder-child.ts'

export interface Holder extends AsyncDisposable {
  readonly process: Child
  /** One call at a time. */
  call<T>(command: Command): Promise<T>
}

export async function startHolder(connectionString: string, schema: string): Promise<Holder> {
  const child = startChild(new URL('./holder-child.ts', import.meta.url), { args: [connectionString, schema] })
  await child.next(({ ready }) => ready === true)
  return {
    process: child,
    async call<T>(command: Command): Promise<T> {
      child.send(command)
      const line = await child.next(({ answer }) => answer !== undefined)
      return line.answer as T
    },
    [Symbol.asyncDispose]: () => child[Symbol.asyncDispose](),
  }
}

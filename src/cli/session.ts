/** What a running command has: its output, its server, and what ends with it. */

import type { PostgresBus } from '../index.ts'
import { type ConnectOptions, connect, findTarget, type Target } from './connection.ts'
import type { Output } from './output.ts'

export class Session {
  readonly output: Output
  readonly #url: string | undefined
  readonly #schema: string | undefined
  #target: Target | undefined
  readonly #buses: Pick<PostgresBus, 'close'>[] = []

  constructor(output: Output, url: string | undefined, schema: string | undefined) {
    this.output = output
    this.#url = url
    this.#schema = schema
  }

  get target(): Target {
    this.#target ??= findTarget(this.#url, this.#schema, process.env, process.cwd())
    return this.#target
  }

  /** A bus that is closed when the command has ended. */
  async connect(options: ConnectOptions = {}): Promise<PostgresBus> {
    return this.own(await connect(this.target, options))
  }

  /** Closed when the command has ended. */
  own<T extends Pick<PostgresBus, 'close'>>(bus: T): T {
    this.#buses.push(bus)
    return bus
  }

  async close(): Promise<void> {
    await Promise.all(this.#buses.map((bus) => bus.close()))
  }
}

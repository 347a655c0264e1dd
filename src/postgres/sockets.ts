/**
 * The taking of connections, and their end. Their sockets are known, so that they can be cut when a server does not answer: neither pg's pool nor pg-listen lets go
 * of one before it has heard a goodbye, and it would keep the process alive.
 */

import { Socket } from 'node:net'
import type pg from 'pg'

export class Sockets {
  readonly #open = new Set<Socket>()
  #onEmpty: (() => void) | undefined

  /** What pg takes as `stream`. */
  readonly stream = (): Socket => {
    const socket = new Socket()
    this.#open.add(socket)
    socket.once('close', () => {
      this.#open.delete(socket)
      if (this.#open.size === 0) this.#onEmpty?.()
    })
    return socket
  }

  /** Resolves when all are closed, or after `ms`. */
  async closed(ms: number): Promise<void> {
    if (this.#open.size === 0) return
    const { promise, resolve } = Promise.withResolvers<void>()
    this.#onEmpty = resolve
    const timer = setTimeout(resolve, ms)
    await promise
    clearTimeout(timer)
  }

  cut(): void {
    for (const socket of this.#open) socket.destroy()
    this.#open.clear()
  }
}

/**
 * A client of the pool, with a listener for what happens to its connection. The listener is there in the same tick in which the
 * pool takes its own away: a connection may be terminated in the very moment it is ready.
 */
export function takeClient(pool: pg.Pool, onError: (error: unknown) => void): Promise<pg.PoolClient> {
  return new Promise((resolve, reject) => {
    pool.connect((error, client) => {
      if (error || !client) return reject(error)
      client.on('error', onError)
      resolve(client)
    })
  })
}

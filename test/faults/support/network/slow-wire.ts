/** A wire to the server that is far away and hands everything on in pieces of one byte. */

import { connect, createServer, type Server, type Socket } from 'node:net'

export class SlowWire implements AsyncDisposable {
  readonly #server: Server
  readonly #sockets = new Set<Socket>()
  readonly connectionString: string
  /** Pieces that have been handed on. */
  pieces = 0

  private constructor(server: Server, connectionString: string) {
    this.#server = server
    this.connectionString = connectionString
  }

  /** @param delayMs each way */
  static async start(target: string, delayMs: number): Promise<SlowWire> {
    const url = new URL(target)
    const [host, port] = [url.hostname, Number(url.port || 5432)]
    const server = createServer()
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    url.hostname = '127.0.0.1'
    url.port = String((server.address() as { port: number }).port)
    const wire = new SlowWire(server, url.href)
    server.on('connection', (client) => {
      const upstream = connect({ host, port })
      wire.#handOn(client, upstream, delayMs)
      wire.#handOn(upstream, client, delayMs)
    })
    return wire
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const socket of this.#sockets) socket.destroy()
    await new Promise<void>((resolve) => this.#server.close(() => resolve()))
  }

  #handOn(from: Socket, to: Socket, delayMs: number): void {
    this.#sockets.add(from)
    from.setNoDelay(true)
    let before: Promise<void> = Promise.resolve()
    const later = (act: () => Promise<void> | void) => {
      const due = new Promise<void>((resolve) => setTimeout(resolve, delayMs))
      before = before.then(() => due).then(act)
    }
    from.on('data', (data) => later(() => this.#inPieces(data, to)))
    from.on('end', () => later(() => void to.end()))
    from.on('error', () => to.destroy())
    from.on('close', () => this.#sockets.delete(from))
  }

  /** The next one when the last has gone: what is queued would be sent together. */
  async #inPieces(data: Buffer, to: Socket): Promise<void> {
    for (let at = 0; at < data.length && !to.destroyed; at++) {
      await new Promise<void>((resolve) => to.write(data.subarray(at, at + 1), () => resolve()))
      this.pieces++
    }
  }
}

/** A wire to the server that can be frozen and cut: what no server does on command, a network does. */

import { connect, createServer, type Server, type Socket } from 'node:net'

interface Wire {
  readonly client: Socket
  readonly server: Socket
  silent: boolean
}

export class Relay implements AsyncDisposable {
  readonly #server: Server
  readonly #wires = new Set<Wire>()
  /** The server, by way of this relay. */
  readonly connectionString: string
  #answersHeld = false
  #frozen = false
  #refusing = false
  #heldAfter = Number.POSITIVE_INFINITY
  /** Connections that were refused. */
  refused = 0
  /** Connections that were taken while it was frozen. */
  taken = 0

  private constructor(server: Server, connectionString: string) {
    this.#server = server
    this.connectionString = connectionString
  }

  static async start(target: string): Promise<Relay> {
    const url = new URL(target)
    const [host, port] = [url.hostname, Number(url.port || 5432)]
    const server = createServer({ allowHalfOpen: true })
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    url.hostname = '127.0.0.1'
    url.port = String((server.address() as { port: number }).port)
    const relay = new Relay(server, url.href)
    server.on('connection', (client) => relay.#wire(client, host, port))
    return relay
  }

  /** Whatever the server answers from now on waits. */
  holdAnswers(): void {
    this.#answersHeld = true
    this.#apply()
  }

  /** Of each new connection the answers wait once the client has spoken so many times. @see thaw */
  holdNewAfter(times: number): void {
    this.#heldAfter = times
  }

  /** Nothing goes either way, not even the end of a connection: half-open. */
  freeze(): void {
    this.#frozen = true
    this.#apply()
  }

  /** The connections that are open go silent for ever, as behind a router that has forgotten them; new ones work. */
  silence(): void {
    for (const wire of this.#wires) wire.silent = true
    this.#apply()
  }

  thaw(): void {
    this.#frozen = false
    this.#answersHeld = false
    this.#heldAfter = Number.POSITIVE_INFINITY
    this.#apply()
  }

  /** New connections are closed at once; those that are there go on. */
  refuse(refusing: boolean): void {
    this.#refusing = refusing
  }

  /** Ends every connection in the middle of whatever goes on. */
  cut(): void {
    for (const { client, server } of this.#wires) {
      client.destroy()
      server.destroy()
    }
  }

  /** The same with RST: an error where the other is an end. */
  reset(): void {
    for (const { client, server } of this.#wires) {
      client.resetAndDestroy()
      server.destroy()
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#refusing = true
    this.cut()
    await new Promise<void>((resolve) => this.#server.close(() => resolve()))
  }

  #wire(client: Socket, host: string, port: number): void {
    client.on('error', () => {})
    if (this.#refusing) {
      this.refused++
      client.destroy()
      return
    }
    if (this.#frozen) this.taken++
    const server = connect({ host, port, allowHalfOpen: true, noDelay: true })
    server.on('error', () => client.destroy())
    client.setNoDelay(true)
    const wire: Wire = { client, server, silent: false }
    this.#wires.add(wire)
    let times = 0
    client.on('data', (data) => {
      if (++times >= this.#heldAfter) server.pause()
      server.write(data)
    })
    server.on('data', (data) => void client.write(data))
    client.on('end', () => server.end())
    server.on('end', () => client.end())
    const over = () => {
      if (this.#frozen || wire.silent) return
      client.destroy()
      server.destroy()
      this.#wires.delete(wire)
    }
    client.on('close', over)
    server.on('close', over)
    this.#apply()
  }

  #apply(): void {
    for (const { client, server, silent } of this.#wires) {
      if (this.#frozen || silent) client.pause()
      else client.resume()
      if (this.#frozen || silent || this.#answersHeld) server.pause()
      else server.resume()
    }
  }
}

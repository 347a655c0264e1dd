/** A wire to any server that can be shut: as if the server were away, or as if the process that uses the wire had died with its machine. */

import { connect, createServer, type Server, type Socket } from 'node:net'

export class Gate implements AsyncDisposable {
  readonly #server: Server
  readonly #sockets = new Set<Socket>()
  readonly port: number
  #open = true
  #deaf = false

  private constructor(server: Server) {
    this.#server = server
    this.port = (server.address() as { port: number }).port
  }

  static async start(host: string, port: number): Promise<Gate> {
    const server = createServer()
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    const gate = new Gate(server)
    server.on('connection', (client) => gate.#wire(client, host, port))
    return gate
  }

  /** Every connection ends at both ends, and new ones end at once. */
  shut(): void {
    this.#open = false
    for (const socket of this.#sockets) socket.destroy()
  }

  open(): void {
    this.#deaf = false
    this.#open = true
  }

  /** The server hears everything, and what it answers is lost. */
  loseAnswers(): void {
    this.#deaf = true
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.shut()
    await new Promise<void>((resolve) => this.#server.close(() => resolve()))
  }

  #wire(client: Socket, host: string, port: number): void {
    client.on('error', () => {})
    if (!this.#open) return void client.destroy()
    const server = connect({ host, port, noDelay: true })
    client.setNoDelay(true)
    server.on('error', () => {})
    for (const socket of [client, server]) {
      this.#sockets.add(socket)
      socket.on('close', () => {
        this.#sockets.delete(socket)
        client.destroy()
        server.destroy()
      })
    }
    client.on('data', (data) => server.write(data))
    server.on('data', (data) => {
      if (!this.#deaf) client.write(data)
    })
  }
}

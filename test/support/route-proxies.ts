/** What stands between the servers of a cluster, so that two of them can be parted while the third hears both. */

import { connect, createServer, type Server, type Socket } from 'node:net'

interface Link {
  readonly to: string
  /** Known from what it says first. */
  from: string | undefined
  readonly sockets: readonly Socket[]
}

export class RouteProxies {
  readonly #servers: Server[] = []
  readonly #links = new Set<Link>()
  readonly #parted = new Set<string>()

  /** @returns the port on which others reach that server's routes */
  async before(name: string, port: number): Promise<number> {
    const server = createServer((client) => this.#pass(client, name, port))
    this.#servers.push(server)
    await new Promise<void>((resolve) => void server.listen(0, '127.0.0.1', resolve))
    const address = server.address()
    return typeof address === 'object' && address !== null ? address.port : 0
  }

  /** Cuts what joins the two, and lets nothing new through. */
  part(a: string, b: string): void {
    this.#parted.add(pair(a, b))
    for (const link of this.#links) if (this.#isParted(link)) end(link)
  }

  join(): void {
    this.#parted.clear()
  }

  async close(): Promise<void> {
    for (const link of this.#links) end(link)
    await Promise.all(this.#servers.map((server) => new Promise<void>((resolve) => void server.close(() => resolve()))))
  }

  #isParted({ from, to }: Link): boolean {
    return from !== undefined && this.#parted.has(pair(from, to))
  }

  #pass(client: Socket, to: string, port: number): void {
    const upstream = connect(port, '127.0.0.1')
    const link: Link = { to, from: undefined, sockets: [client, upstream] }
    this.#links.add(link)
    let said = ''
    client.on('data', (chunk) => {
      if (link.from === undefined) {
        said += chunk.toString('latin1')
        link.from = /"server_name":"([a-z]+)"/.exec(said)?.[1]
        if (this.#isParted(link)) return end(link)
      }
      upstream.write(chunk)
    })
    upstream.on('data', (chunk) => client.write(chunk))
    for (const socket of link.sockets) {
      socket.on('error', () => {})
      socket.on('close', () => {
        end(link)
        this.#links.delete(link)
      })
    }
  }
}

function end({ sockets }: Link): void {
  for (const socket of sockets) socket.destroy()
}

function pair(a: string, b: string): string {
  return [a, b].sort().join(' ')
}

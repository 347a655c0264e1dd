/**
 * A wire to the server that understands what goes over it, as far as is needed to lose an answer at will: the server has executed
 * the statement and said so, and the client never hears of it. What it lets through goes byte by byte as it came.
 *
 * The driver asks one thing at a time on a connection, so the answer to a statement is whatever the server says until it is ready
 * for the next one.
 */

import { connect, createServer, type Server, type Socket } from 'node:net'

/** What becomes of the connection when the answer is lost: it ends, or stays open and nothing comes any more. */
export type End = 'cut' | 'silent'

interface Loss {
  readonly matches: RegExp
  readonly of: 'request' | 'answer'
  readonly end: End
  /** How much of it still gets through. */
  readonly share: number
  readonly done: PromiseWithResolvers<void>
}

interface Wire {
  readonly client: Socket
  readonly server: Socket
  readonly statements: Map<string, string>
  /** What the client has sent of a message that is not whole yet. */
  asked: Buffer
  answered: Buffer
  started: boolean
  /** The answer that is being kept back. */
  losing: { readonly loss: Loss; readonly kept: Buffer[] } | undefined
  dead: boolean
}

export class Tap implements AsyncDisposable {
  readonly #server: Server
  readonly #wires = new Set<Wire>()
  /** The server, by way of this tap. */
  readonly connectionString: string
  #armed: Loss | undefined
  /** Answers and requests that were lost. */
  losses = 0

  private constructor(server: Server, connectionString: string) {
    this.#server = server
    this.connectionString = connectionString
  }

  static async start(target: string): Promise<Tap> {
    const url = new URL(target)
    const [host, port] = [url.hostname, Number(url.port || 5432)]
    const server = createServer()
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    url.hostname = '127.0.0.1'
    url.port = String((server.address() as { port: number }).port)
    const tap = new Tap(server, url.href)
    server.on('connection', (client) => tap.#wire(client, host, port))
    return tap
  }

  /**
   * The next statement that matches is executed, and its answer is lost.
   * @param share how much of the answer still arrives, 0 to 1
   * @returns resolves when the server has answered that it is done
   */
  loseAnswer(matches: RegExp, end: End = 'cut', share = 0): Promise<void> {
    return this.#arm({ matches, of: 'answer', end, share, done: Promise.withResolvers() })
  }

  /**
   * The connection ends in the middle of the next statement that matches: the server never executes it.
   * @returns resolves when half of it has been sent
   */
  breakRequest(matches: RegExp): Promise<void> {
    return this.#arm({ matches, of: 'request', end: 'cut', share: 0.5, done: Promise.withResolvers() })
  }

  /** What was asked to be lost and has not come yet gets through. */
  loseNothing(): void {
    this.#armed = undefined
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const wire of this.#wires) this.#end(wire)
    await new Promise<void>((resolve) => this.#server.close(() => resolve()))
  }

  #arm(loss: Loss): Promise<void> {
    this.#armed = loss
    loss.done.promise.catch(() => {}) // whoever waits for it hears of it
    return loss.done.promise
  }

  #wire(client: Socket, host: string, port: number): void {
    const server = connect({ host, port, noDelay: true })
    client.setNoDelay(true)
    const wire: Wire = {
      client,
      server,
      statements: new Map(),
      asked: Buffer.alloc(0),
      answered: Buffer.alloc(0),
      started: false,
      losing: undefined,
      dead: false,
    }
    this.#wires.add(wire)
    client.on('error', () => {})
    server.on('error', () => {})
    client.on('data', (data) => this.#asked(wire, data))
    server.on('data', (data) => this.#answered(wire, data))
    client.on('close', () => this.#end(wire))
    server.on('close', () => {
      if (!wire.dead) this.#end(wire)
    })
  }

  #end(wire: Wire): void {
    wire.client.destroy()
    wire.server.destroy()
    this.#wires.delete(wire)
  }

  #asked(wire: Wire, data: Buffer): void {
    if (wire.dead) return
    wire.asked = Buffer.concat([wire.asked, data])
    for (;;) {
      // The first message has no type before its length.
      const head = wire.started ? 1 : 0
      if (wire.asked.length < head + 4) return
      const length = head + wire.asked.readInt32BE(head)
      if (wire.asked.length < length) return
      const message = wire.asked.subarray(0, length)
      wire.asked = wire.asked.subarray(length)
      const text = wire.started ? textOf(wire, message) : undefined
      wire.started = true
      const loss = this.#armed
      if (text !== undefined && loss?.matches.test(text)) {
        this.#armed = undefined
        this.losses++
        if (loss.of === 'request') {
          wire.dead = true
          wire.server.write(message.subarray(0, length / 2), () => {
            this.#end(wire)
            loss.done.resolve()
          })
          return
        }
        wire.losing = { loss, kept: [] }
      }
      wire.server.write(message)
    }
  }

  #answered(wire: Wire, data: Buffer): void {
    if (wire.dead) return
    if (!wire.losing) {
      wire.client.write(data)
      return
    }
    const { loss, kept } = wire.losing
    kept.push(data)
    wire.answered = Buffer.concat([wire.answered, data])
    for (;;) {
      if (wire.answered.length < 5) return
      const length = 1 + wire.answered.readInt32BE(1)
      if (wire.answered.length < length) return
      const type = String.fromCharCode(wire.answered[0] as number)
      const status = String.fromCharCode(wire.answered[5] ?? 0)
      wire.answered = wire.answered.subarray(length)
      if (type === 'E') loss.done.reject(new Error('the statement whose answer was to be lost has failed'))
      if (type !== 'Z') continue
      if (status !== 'I') loss.done.reject(new Error('the statement whose answer was to be lost has left a transaction open'))
      const answer = Buffer.concat(kept)
      wire.dead = true
      if (loss.share > 0) wire.client.write(answer.subarray(0, Math.ceil(answer.length * loss.share)))
      if (loss.end === 'cut') this.#end(wire)
      loss.done.resolve()
      return
    }
  }
}

/** The statement that a message of the client executes. */
function textOf(wire: Wire, message: Buffer): string | undefined {
  const type = String.fromCharCode(message[0] as number)
  const strings = message.toString('latin1', 5).split('\0')
  if (type === 'Q') return strings[0]
  if (type === 'P') wire.statements.set(strings[0] ?? '', strings[1] ?? '')
  return type === 'B' ? wire.statements.get(strings[1] ?? '') : undefined
}

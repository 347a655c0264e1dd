import type { Bridge, BridgeStats, Bus } from '../../index.ts'
import { command } from '../command.ts'
import { EXIT, isBusFailure, sentence, UsageError } from '../failure.ts'
import { aborted, Interrupts } from '../interrupts.ts'
import { connectNats, findNats, NATS_OPTIONS } from '../nats.ts'
import type { Output } from '../output.ts'
import { lineOn } from '../progress.ts'
import { number, plural } from '../text.ts'
import { startOf } from '../values.ts'

const BACKENDS = ['postgres', 'nats'] as const
const MOST_PAYLOAD_BYTES = 8 * 1024 * 1024
const LOOK_EVERY_MS = 200
/** One that is to have the lease at once has it by then. */
const WAITS_MS = 1_000
/** What is pending is counted by the server, message by message: at most a tenth of the time. */
const COUNT_EVERY_MS = 2_000
const COUNT_SHARE = 10

const bridge = command({
  name: 'bridge',
  summary: 'relay messages between PostgreSQL and NATS',
  details:
    'A durable on the one side is read, and each message is stored on the other before it is acknowledged, with an id by which that side knows it again: killed at any moment and started again within two minutes, none is lost and none is there twice. The messages of a subject stay in order. Run two for one durable: the second one waits, and takes over within twice --ack-wait. Messages keep their subject, payload and headers. A message that the other side does not take, being too large for it, is published on DURABLE.dlq. Messages that came from the other side through a bridge are not sent back. Progress is on standard error, or with --json on standard output, a line each --every. Ctrl-C relays what has been read and ends.',
  arguments: {},
  options: {
    from: { type: 'text', value: 'BACKEND', description: 'where messages are read', choices: BACKENDS, required: true },
    to: { type: 'text', value: 'BACKEND', description: 'where they are stored', choices: BACKENDS, required: true },
    subject: { type: 'text', value: 'FILTER', description: "which; * is one token, a last > the rest: 'orders.>'", required: true },
    durable: { type: 'text', short: 'd', value: 'NAME', description: "the durable to read; else bridge- and the filter's tokens" },
    start: {
      type: 'text',
      value: 'WHERE',
      description: 'where a durable that is made begins: all, new, the number of a message, a time',
      default: 'all',
    },
    ...NATS_OPTIONS,
    'in-flight': { type: 'integer', value: 'N', description: 'messages read ahead', default: '256', least: 1, most: 10_000 },
    'ack-wait': { type: 'duration', value: 'TIME', description: 'so long the next one waits after a crash; at least 1s', default: '10s' },
    every: {
      type: 'duration',
      value: 'TIME',
      description: 'between two lines of progress; a terminal shows it all the time',
      default: '10s',
    },
    idle: { type: 'duration', value: 'TIME', description: 'end when there was nothing to relay for so long' },
  },
  examples: [
    { line: "klieo-bus bridge --from postgres --to nats --subject 'orders.>'", says: 'what is published on Postgres, to a fleet on NATS' },
    { line: "klieo-bus bridge --from nats --to postgres --subject 'sensors.*' --start new", says: 'the other way round, from now on' },
    { line: "klieo-bus bridge --from postgres --to nats --subject '>' --idle 10s", says: 'a move: everything that is stored, then end' },
  ],
  exitCodes: { 4: 'the durable exists with another filter' },
  async run({ options }, session) {
    const { output } = session
    const { from, to, subject, idle } = options
    if (from === to) throw new UsageError('--from and --to are two different ones of postgres, nats')
    const durable = options.durable ?? durableOf(subject)
    const start = startOf('--start', options.start)
    const target = await findNats(options, process.env)
    const { Bridge } = await import('../../index.ts')
    using interrupts = new Interrupts()
    // Whatever the app that publishes allows.
    const postgres = await session.connect({ maxPayloadBytes: MOST_PAYLOAD_BYTES })
    const nats = session.own(await connectNats(target))
    const [source, sink]: [Bus, Bus] = from === 'postgres' ? [postgres, nats] : [nats, postgres]
    const running = new Bridge(source, sink, subject, {
      durable,
      start,
      maxInFlight: options['in-flight'],
      ackWaitMs: options['ack-wait'],
      onError: (error) => tell(output, error),
    })
    if (process.stderr.isTTY) output.note(output.styleError('dim', `durable ${durable} on ${from}; Ctrl-C ends it`))
    const report = new Report(running, source, durable, options['ack-wait'], output)
    try {
      await Promise.race([running.ended, aborted(interrupts.drain), output.gone, report.run(options.every, idle)])
      await Promise.race([running.stop(), aborted(interrupts.kill)])
    } finally {
      report.end()
    }
    await report.last()
    return interrupts.kill.aborted ? EXIT.interrupted : EXIT.done
  },
})

/** Readable, and the same each time. Two filters may share one: the second is refused, as its durable has another filter. */
export function durableOf(filter: string): string {
  const name = filter
    .replaceAll('>', 'all')
    .replaceAll('*', 'any')
    .replaceAll(/[^A-Za-z0-9_-]/g, '-')
  return `bridge-${name}`.slice(0, 128)
}

function tell(output: Output, error: unknown): void {
  if (isBusFailure(error) && error.code === 'closed') return
  output.warn(sentence(error))
}

class Report {
  readonly #bridge: Bridge
  readonly #from: Bus
  readonly #durable: string
  readonly #ackWaitMs: number
  readonly #output: Output
  readonly #line = lineOn(process.stderr)
  readonly #startedAt = performance.now()
  readonly #over = new AbortController()
  #pending: number | undefined
  #counting: Promise<void> | undefined
  #countAgainAt = 0
  /** Since when the source has answered each time. */
  #answersSince = Number.POSITIVE_INFINITY

  constructor(bridge: Bridge, from: Bus, durable: string, ackWaitMs: number, output: Output) {
    this.#ackWaitMs = ackWaitMs
    this.#bridge = bridge
    this.#from = from
    this.#durable = durable
    this.#output = output
  }

  /** Resolves when there was nothing to do for `idleMs`. */
  async run(everyMs: number, idleMs: number | undefined): Promise<void> {
    let shownAt = performance.now()
    let movedAt = performance.now()
    let done = -1
    let waitsSince = performance.now()
    let patienceMs = WAITS_MS
    let toldOfWaiting = false
    while (!this.#over.signal.aborted) {
      const { stats } = this.#bridge
      const now = performance.now()
      if (now >= this.#countAgainAt) this.#counting ??= this.#count()
      const sum = stats.relayed + stats.duplicates + stats.skipped + stats.refused
      if (sum !== done || stats.held > 0 || stats.state !== 'relaying' || this.#pending !== 0) movedAt = now
      done = sum
      if (stats.state !== 'waiting') {
        waitsSince = now
        // What it waits for may be its own lease, which it lost while the server was away.
        patienceMs = 2 * this.#ackWaitMs
      }
      // A server that does not answer is no other bridge.
      if (!toldOfWaiting && now - Math.max(waitsSince, this.#answersSince) > patienceMs) {
        toldOfWaiting = true
        this.#output.note(`another bridge reads durable ${this.#durable}; this one takes over when that ends`)
      }
      this.#line.show(describe(stats, this.#pending, now - this.#startedAt))
      if (now - shownAt >= everyMs) {
        shownAt = now
        await this.#show()
      }
      if (idleMs !== undefined && now - movedAt >= idleMs) return
      await pause(LOOK_EVERY_MS, this.#over.signal)
    }
    await new Promise(() => {})
  }

  end(): void {
    this.#over.abort()
    this.#line.end()
  }

  async last(): Promise<void> {
    const { stats } = this.#bridge
    if (this.#output.json) return this.#object(stats)
    await this.#output.line(`relayed ${plural(stats.relayed, 'message')}${extras(stats)}`)
  }

  async #show(): Promise<void> {
    const { stats } = this.#bridge
    if (this.#output.json) return this.#object(stats)
    if (!process.stderr.isTTY) this.#output.note(describe(stats, this.#pending, performance.now() - this.#startedAt))
  }

  #object(stats: BridgeStats): Promise<void> {
    const { oldestHeldAt, ...counts } = stats
    return this.#output.object({ durable: this.#durable, ...counts, pending: this.#pending ?? null, behindMs: behindMs(stats) })
  }

  async #count(): Promise<void> {
    const startedAt = performance.now()
    try {
      const found = (await this.#from.admin.durables()).find(({ durable }) => durable === this.#durable)
      this.#pending = found ? found.pending + found.redelivering : undefined
      const now = performance.now()
      this.#answersSince = Math.min(this.#answersSince, now)
      // It is about to be made.
      const everyMs = found ? COUNT_EVERY_MS : LOOK_EVERY_MS
      this.#countAgainAt = now + Math.max(everyMs, COUNT_SHARE * (now - startedAt))
    } catch {
      // It is a figure to look at: the bridge itself tells of a server that is away, and another right may be missing.
      this.#pending = undefined
      this.#answersSince = Number.POSITIVE_INFINITY
      this.#countAgainAt = performance.now() + COUNT_EVERY_MS
    }
    this.#counting = undefined
  }
}

function behindMs({ oldestHeldAt }: BridgeStats): number {
  return oldestHeldAt === undefined ? 0 : Math.max(0, Date.now() - oldestHeldAt.getTime())
}

function describe(stats: BridgeStats, pending: number | undefined, tookMs: number): string {
  const rate = Math.round((stats.relayed * 1_000) / Math.max(1, tookMs))
  const state = stats.state === 'relaying' ? '' : `${stats.state}: `
  const left = pending === undefined ? '' : `, ${number(pending)} pending`
  return `${state}${number(stats.relayed)} relayed, ${number(rate)}/s${left}, ${(behindMs(stats) / 1_000).toFixed(1)} s behind${extras(stats)}`
}

function extras({ duplicates, skipped, refused }: BridgeStats): string {
  const parts = [
    duplicates > 0 && `${number(duplicates)} were there before`,
    skipped > 0 && `${number(skipped)} came from there`,
    refused > 0 && `${number(refused)} refused`,
  ].filter((part) => part !== false)
  return parts.length === 0 ? '' : ` (${parts.join(', ')})`
}

function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer)
      signal.removeEventListener('abort', done)
      resolve()
    }
    const timer = setTimeout(done, ms)
    signal.addEventListener('abort', done, { once: true })
  })
}

export const COMMANDS = [bridge]

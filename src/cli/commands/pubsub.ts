import type { Msg, PostgresBus } from '../../index.ts'
import { command } from '../command.ts'
import { exec, failureOf, headerVariables } from '../exec.ts'
import { EXIT, isBusFailure, sentence, UsageError } from '../failure.ts'
import { Interrupts } from '../interrupts.ts'
import type { Output } from '../output.ts'
import { HEADER_OPTION, MAX_PAYLOAD_OPTION, PAYLOAD_ARGUMENT, payloadOf } from '../payload.ts'
import { payloadFields, printable, shownPayload } from '../text.ts'
import { headersOf, startOf } from '../values.ts'

const publish = command({
  name: 'publish',
  summary: 'publish a message',
  arguments: { subject: { description: 'tokens joined by dots: orders.created' }, payload: PAYLOAD_ARGUMENT },
  options: {
    ...HEADER_OPTION,
    'msg-id': { type: 'text', value: 'ID', description: 'a second publish with it within two minutes stores nothing' },
    ...MAX_PAYLOAD_OPTION,
  },
  examples: [
    { line: `klieo-bus publish orders.created '{"order":7}' -H trace:abc`, says: 'prints the number of the message' },
    { line: 'klieo-bus publish images.new < cat.png', says: 'standard input, byte for byte' },
  ],
  async run({ args, options }, session) {
    const maxPayloadBytes = options['max-payload']
    const payload = await payloadOf(args.payload, maxPayloadBytes)
    const headers = headersOf(options.header)
    const bus = await session.connect({ maxPayloadBytes })
    const msgId = options['msg-id']
    const { seq, duplicate } = await bus.pubsub.publish(args.subject, payload, {
      ...(headers === undefined ? {} : { headers }),
      ...(msgId === undefined ? {} : { msgId }),
    })
    const text = duplicate ? `message ${seq} was published with this id before; nothing was stored` : `published message ${seq}`
    await session.output.result({ seq, duplicate }, text)
    return EXIT.done
  },
})

const subscribe = command({
  name: 'subscribe',
  summary: 'show messages, or run a command for each',
  details:
    'With --durable the messages are shared with the other members of that durable, and what comes while nobody is there is kept for it. Without, a durable is made for this run, begins with what is new, and is deleted at the end. A message is acknowledged when it is written, or when the command has ended with exit code 0; after another one it is delivered again.',
  arguments: { filter: { description: "a subject; * is one token, a last > the rest: 'orders.>'" } },
  options: {
    durable: { type: 'text', short: 'd', value: 'NAME', description: 'the durable to join, or to make' },
    start: { type: 'text', value: 'WHERE', description: 'where a durable that is made begins: all, new, the number of a message, a time' },
    exec: {
      type: 'command',
      value: 'COMMAND',
      description: 'run it for each message: payload on standard input, the rest in KLIEO_* variables',
    },
    concurrency: { type: 'integer', value: 'N', description: 'commands at once', default: '1', least: 1, most: 1_000 },
    'ack-wait': {
      type: 'duration',
      value: 'TIME',
      description: 'so long a message may be held; extended while a command runs',
      default: '30s',
    },
    'max-deliver': {
      type: 'integer',
      value: 'N',
      description: 'deliveries before a message goes to DURABLE.dlq; else without end',
      least: 1,
    },
    'retry-delay': { type: 'duration', value: 'TIME', description: 'before the next delivery after a command that failed', default: '1s' },
    count: { type: 'integer', value: 'N', description: 'end after so many messages', least: 1 },
    idle: { type: 'duration', value: 'TIME', description: 'end when no message has come for so long' },
    raw: { type: 'flag', description: 'only the payloads, byte for byte, a newline after each' },
  },
  examples: [
    { line: "klieo-bus subscribe 'orders.>'", says: 'what is published from now on' },
    { line: "klieo-bus subscribe 'orders.*' --durable billing --count 1 --json", says: 'the next message of a durable' },
    {
      line: "klieo-bus subscribe 'orders.*' --durable mail --exec 'mail -s \"$KLIEO_SUBJECT\" ops@example.com'",
      says: 'a command for each',
    },
  ],
  async run({ args, options }, session) {
    const { output } = session
    if (options.raw && output.json) throw new UsageError('subscribe takes one of --raw and --json')
    const start = options.start === undefined ? undefined : startOf('--start', options.start)
    const bus = await session.connect()
    using interrupts = new Interrupts()
    const durable = options.durable ?? `cli-${crypto.randomUUID().slice(0, 8)}`
    const stream = await bus.pubsub.subscribe(args.filter, durable, {
      start: start ?? (options.durable === undefined ? 'new' : 'all'),
      ackWaitMs: options['ack-wait'],
      ...(options.exec === undefined ? {} : { maxInFlight: options.concurrency }),
      signal: interrupts.drain,
      ...(options['max-deliver'] === undefined ? {} : { maxDeliver: options['max-deliver'] }),
    })
    if (process.stderr.isTTY) output.note(output.styleError('dim', `listening on ${args.filter} as ${durable}; Ctrl-C ends it`))
    try {
      const handle = options.exec === undefined ? show(output, options.raw) : runFor(output, durable, options.exec, options, interrupts)
      await consume(stream, handle, { ...options, output }, interrupts)
      return interrupts.kill.aborted ? EXIT.interrupted : EXIT.done
    } finally {
      await stream.close()
      if (options.durable === undefined) await forget(bus, durable)
    }
  },
})

async function forget(bus: PostgresBus, durable: string): Promise<void> {
  await bus.pubsub.deleteDurable(durable).catch((error) => {
    if (!isBusFailure(error) || error.code !== 'not_found') throw error
  })
}

interface ConsumeOptions {
  readonly concurrency: number
  readonly count: number | undefined
  readonly idle: number | undefined
  readonly output: Output
}

/** Hands messages to the handler, so many at once, until it is enough or nothing comes, or somebody presses Ctrl-C. */
async function consume(
  stream: AsyncIterable<Msg<never>>,
  handle: (message: Msg<never>) => Promise<void>,
  { concurrency, count = Number.POSITIVE_INFINITY, idle, output }: ConsumeOptions,
  interrupts: Interrupts,
): Promise<void> {
  const running = new Set<Promise<void>>()
  const failed = Promise.withResolvers<never>()
  failed.promise.catch(() => {})
  let timer: NodeJS.Timeout | undefined
  const rest = () => {
    clearTimeout(timer)
    if (idle !== undefined && running.size === 0) timer = setTimeout(() => interrupts.end(), idle)
  }
  rest()
  try {
    let taken = 0
    const messages = stream[Symbol.asyncIterator]()
    while (taken < count) {
      const next = await Promise.race([messages.next(), failed.promise, output.gone])
      if (next.done) break
      clearTimeout(timer)
      taken++
      const run = handle(next.value).then(
        () => {
          running.delete(run)
          rest()
        },
        (error) => failed.reject(error),
      )
      running.add(run)
      if (running.size >= concurrency) await Promise.race([...running, failed.promise])
    }
    await Promise.race([Promise.all(running), failed.promise])
  } finally {
    clearTimeout(timer)
  }
}

function fieldsOf(message: Msg<never>): object {
  const { seq, subject, attempt, publishedAt, headers, payload } = message
  return { seq, subject, attempt, publishedAt, headers, ...payloadFields('payload', payload) }
}

/** What was not written is not acknowledged. */
function show(output: Output, raw: boolean): (message: Msg<never>) => Promise<void> {
  return async (message) => {
    if (raw) await output.write(Buffer.concat([message.payload, Buffer.from('\n')]))
    else await output.result(fieldsOf(message), lineOf(output, message))
    await message.ack().catch((error) => warnOf(output, message, error))
  }
}

/** A settlement that failed is no end: the message comes again, here or elsewhere. */
function warnOf(output: Output, { seq, attempt }: Msg<never>, error: unknown): void {
  if (!isBusFailure(error)) throw error
  if (error.code !== 'closed') output.warn(`message ${seq}, attempt ${attempt}: ${sentence(error)}`)
}

function lineOf(output: Output, { seq, subject, attempt, headers, payload }: Msg<never>): string {
  const extras = Object.entries(headers).map(([name, value]) => `${name}:${printable(value)}`)
  if (attempt > 1) extras.push(`attempt ${attempt}`)
  const more = extras.length === 0 ? '' : ` ${output.style('dim', `(${extras.join(', ')})`)}`
  return `${output.style('dim', `#${seq}`)} ${output.style('cyan', subject)}${more} ${shownPayload(payload)}`
}

interface RunOptions {
  readonly 'ack-wait': number
  readonly 'retry-delay': number
}

function runFor(
  output: Output,
  durable: string,
  line: string,
  options: RunOptions,
  interrupts: Interrupts,
): (message: Msg<never>) => Promise<void> {
  return async (message) => {
    const lost = new AbortController()
    const beat = setInterval(() => {
      message.extend().catch((error) => {
        if (isBusFailure(error) && error.code === 'lease_lost') lost.abort()
      })
    }, options['ack-wait'] / 3)
    const { seq, subject, attempt, headers, payload } = message
    try {
      const result = await exec({
        command: line,
        input: payload,
        env: {
          KLIEO_SUBJECT: subject,
          KLIEO_SEQ: String(seq),
          KLIEO_ATTEMPT: String(attempt),
          KLIEO_DURABLE: durable,
          ...headerVariables(headers),
        },
        stop: lost.signal,
        kill: interrupts.kill,
        onOutput: async (chunk) => (output.json ? void process.stderr.write(chunk) : output.write(chunk)),
        onError: (chunk) => void process.stderr.write(chunk),
      })
      const ok = result.code === 0
      if (ok) await message.ack()
      else await message.nak(interrupts.kill.aborted ? 0 : options['retry-delay'])
      if (!ok) output.warn(`message ${seq}, attempt ${attempt}: ${failureOf({ ...result, tail: '' })}; it is delivered again`)
      if (output.json) await output.object({ ...fieldsOf(message), outcome: ok ? 'acked' : 'failed', exitCode: result.code })
    } catch (error) {
      warnOf(output, message, error)
    } finally {
      clearInterval(beat)
    }
  }
}

export const COMMANDS = [publish, subscribe]

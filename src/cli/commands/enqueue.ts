import { fstatSync } from 'node:fs'
import type { Job, PostgresBus } from '../../index.ts'
import { command } from '../command.ts'
import { EXIT, Failure, isBusFailure, sentence, UsageError } from '../failure.ts'
import { Interrupts } from '../interrupts.ts'
import { type Line, linesOf } from '../lines.ts'
import type { Output } from '../output.ts'
import { HEADER_OPTION, MAX_PAYLOAD_OPTION, standardInput } from '../payload.ts'
import { progressOn } from '../progress.ts'
import { number, plural } from '../text.ts'
import { headersOf } from '../values.ts'

/** A batch is sent before it grows beyond that, however few lines it has. */
const BATCH_BYTES = 4 * 1_048_576

const enqueue = command({
  name: 'enqueue',
  summary: 'enqueue jobs: the arguments, or a line of standard input each',
  details:
    'Lines are bytes and need not be text; the newline, and a carriage return before it, are not part of the payload; an empty line is a job with an empty payload. They are enqueued in batches, each all or not at all, in their order. Where a line cannot be enqueued, those before it have been, and the message says how many: mend the line, and go on with tail -n +NUMBER. A last line without a newline may be half a line of a program that died: it is refused, unless --partial.',
  arguments: {
    queue: { description: 'the name of the queue' },
    payloads: { description: 'a job each; none: standard input', optional: true, rest: true, shownAs: 'PAYLOAD' },
  },
  options: {
    ...HEADER_OPTION,
    'dedup-key': { type: 'text', value: 'KEY', description: 'a later enqueue with it answers this job and adds nothing; for one payload' },
    'max-attempts': { type: 'integer', value: 'N', description: 'claims before a job is dead', default: '5', least: 1 },
    delay: { type: 'duration', value: 'TIME', description: 'not claimable before' },
    at: { type: 'time', value: 'TIME', description: 'not claimable before: 2026-01-31T12:00:00Z' },
    priority: { type: 'integer', value: 'N', description: 'higher first', default: '0', least: -100, most: 100 },
    batch: { type: 'integer', value: 'N', description: 'lines at once', default: '1000', least: 1, most: 10_000 },
    partial: { type: 'flag', description: 'take a last line without a newline, too' },
    ...MAX_PAYLOAD_OPTION,
  },
  examples: [
    { line: `klieo-bus enqueue mail '{"to":"ada"}' --delay 10m`, says: 'prints the id of the job' },
    { line: "printf '%s\\n' a b c | klieo-bus enqueue letters", says: 'three jobs' },
    { line: 'klieo-bus enqueue urls < urls.txt', says: 'with a progress bar on a terminal' },
  ],
  exitCodes: { 1: 'failed; the message says how many lines were enqueued' },
  async run({ args, options }, session) {
    if (options.delay !== undefined && options.at !== undefined) throw new UsageError('enqueue takes one of --delay and --at')
    const headers = headersOf(options.header)
    const rest: Omit<Job, 'payload'> = {
      maxAttempts: options['max-attempts'],
      priority: options.priority,
      ...(headers === undefined ? {} : { headers }),
      ...(options.delay === undefined ? {} : { delayMs: options.delay }),
      ...(options.at === undefined ? {} : { runAt: options.at }),
    }
    const dedupKey = options['dedup-key']
    if (dedupKey !== undefined && args.payloads.length !== 1) throw new UsageError('--dedup-key is for one payload, given as an argument')
    const maxPayloadBytes = options['max-payload']
    const { output } = session
    if (args.payloads.length === 0 && process.stdin.isTTY) output.note('a job a line; Ctrl-D ends')
    const bus = await session.connect({ maxPayloadBytes })
    if (args.payloads.length > 0) {
      const jobs = args.payloads.map((payload) => ({ payload, ...rest, ...(dedupKey === undefined ? {} : { dedupKey }) }))
      const ids = await bus.jobs.enqueueMany(args.queue, jobs)
      for (const id of ids) await output.report({ queue: args.queue, id }, `job ${id}`)
      return EXIT.done
    }
    let headerBytes = 0
    for (const [name, value] of Object.entries(headers ?? {})) headerBytes += name.length + Buffer.byteLength(value)
    return enqueueLines(bus, args.queue, rest, {
      output,
      batch: options.batch,
      partial: options.partial,
      maxBytes: maxPayloadBytes - headerBytes,
    })
  },
})

interface LinesOptions {
  readonly output: Output
  readonly batch: number
  readonly partial: boolean
  readonly maxBytes: number
}

async function enqueueLines(bus: PostgresBus, queue: string, rest: Omit<Job, 'payload'>, options: LinesOptions): Promise<number> {
  const { output, batch, maxBytes } = options
  using interrupts = new Interrupts()
  // Nothing more is read, and what was read is enqueued.
  interrupts.drain.addEventListener('abort', () => process.stdin.destroy())
  const input = standardInput()
  const progress = progressOn(process.stderr, 'jobs')
  const size = sizeOf(process.stdin.fd)
  let done = 0
  let read = 0
  let waiting: Line[] = []
  let waitingBytes = 0
  const tell = async (ids: readonly string[]) => {
    try {
      for (const id of ids) await output.report({ queue, id }, id)
    } catch (error) {
      throw new Failure(EXIT.failed, `${enqueuedSoFar(done)}; standard output cannot be written: ${sentence(error)}`, { cause: error })
    }
  }
  const send = async () => {
    if (waiting.length === 0) return
    const jobs = waiting.map(({ bytes }) => ({ payload: bytes, ...rest }))
    const ids = await bus.jobs.enqueueMany(queue, jobs).catch((error) => {
      if (!isBusFailure(error)) throw error
      throw failureAt(error, done, jobs.length)
    })
    done += ids.length
    read += waitingBytes + waiting.length
    // Before anything else can fail: what waits is sent once.
    waiting = []
    waitingBytes = 0
    if (output.json) await tell(ids)
    progress.show(done, size === undefined ? undefined : read / size)
  }
  try {
    for await (const line of linesOf(untilDestroyed(input), maxBytes)) {
      const problem = interrupts.drain.aborted ? undefined : problemOf(line, options)
      if (problem !== undefined) {
        await send()
        progress.end()
        throw new Failure(EXIT.failed, `${enqueuedSoFar(done)}; line ${number(line.number)}: ${problem}`)
      }
      if (interrupts.drain.aborted && line.problem !== undefined) break
      waiting.push(line)
      waitingBytes += line.bytes.byteLength
      if (waiting.length >= batch || waitingBytes >= BATCH_BYTES) await send()
    }
    await send()
  } catch (error) {
    if (error instanceof Failure) throw error
    // Standard input failed, not we: what it gave is enqueued.
    await send()
    progress.end()
    throw new Failure(EXIT.failed, `${enqueuedSoFar(done)}; standard input cannot be read: ${sentence(error)}`, { cause: error })
  } finally {
    progress.end()
  }
  if (interrupts.drain.aborted) throw new Failure(EXIT.interrupted, `interrupted; ${enqueuedSoFar(done)}`)
  if (!output.json) await output.line(`${plural(done, 'job')} enqueued in "${queue}"`)
  return EXIT.done
}

function problemOf(line: Line, { partial, maxBytes }: LinesOptions): string | undefined {
  if (line.problem === 'too-long') return `it is larger than ${number(maxBytes)} bytes, the limit of a payload [payload_too_large]`
  if (line.problem === 'partial' && !partial)
    return 'it has no newline at its end, so it may be half a line; --partial takes it all the same'
  return undefined
}

/** @param count lines of the batch that failed */
function failureAt(error: Error & { code: string }, done: number, count: number): Failure {
  const lines = `lines ${number(done + 1)} to ${number(done + count)}`
  // Without an answer nobody knows whether the batch was stored; a refusal stored nothing.
  const unknown = error.code === 'connection' ? `; of ${lines} either all or none were` : ''
  return new Failure(EXIT.failed, `${enqueuedSoFar(done)}${unknown}: ${sentence(error)}`, { cause: error })
}

function enqueuedSoFar(done: number): string {
  return done === 0 ? 'nothing was enqueued' : `${number(done)} of the lines ${done === 1 ? 'was' : 'were'} enqueued`
}

/** Of a file; a pipe has none. */
function sizeOf(fd: number): number | undefined {
  try {
    const stat = fstatSync(fd)
    return stat.isFile() && stat.size > 0 ? stat.size : undefined
  } catch {
    return undefined
  }
}

/** A stream that was ended from here just ends. */
async function* untilDestroyed(stream: NodeJS.ReadStream): AsyncGenerator<Uint8Array> {
  try {
    yield* stream as AsyncIterable<Buffer>
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ERR_STREAM_PREMATURE_CLOSE') throw error
  }
}

export const COMMANDS = [enqueue]

import type { ClaimedJob } from '../../index.ts'
import { command } from '../command.ts'
import { exec, failureOf, headerVariables } from '../exec.ts'
import { EXIT, Failure, isBusFailure, ReaderGone, sentence } from '../failure.ts'
import { aborted, Interrupts } from '../interrupts.ts'
import { Limited } from '../limited.ts'
import type { Output } from '../output.ts'

/** As long as a timer can wait: until everything that runs has ended by itself. */
const FOR_EVER_MS = 2_147_483_647

const work = command({
  name: 'work',
  summary: 'run a command for each job of a queue',
  details:
    'The payload is on standard input of the command, headers are in KLIEO_HEADER_*, and KLIEO_QUEUE, KLIEO_JOB_ID, KLIEO_ATTEMPT, KLIEO_MAX_ATTEMPTS and KLIEO_FENCE say which job it is. Exit code 0: the job is done. Another one: it comes again after a while, until its attempts are used up; the end of what the command wrote on standard error is kept as its error. Killed halfway, or out of reach for longer than --lease, the job goes to another worker. Ctrl-C lets running commands end; the second one kills them, and their jobs go back.',
  arguments: { queue: { description: 'the name of the queue' } },
  options: {
    exec: { type: 'command', value: 'COMMAND', description: 'what to run, by the shell', required: true },
    concurrency: { type: 'integer', short: 'c', value: 'N', description: 'commands at once', default: '1', least: 1, most: 1_000 },
    lease: { type: 'duration', value: 'TIME', description: 'how long a job outlives a worker that dies', default: '30s' },
    grace: {
      type: 'duration',
      value: 'TIME',
      description: 'how long running commands may take after Ctrl-C or SIGTERM; else as long as they need',
    },
    'worker-id': { type: 'text', value: 'ID', description: 'shown beside a running job; else a random one' },
    count: { type: 'integer', value: 'N', description: 'end after so many jobs', least: 1 },
    'until-empty': { type: 'flag', description: 'end when nothing is claimable' },
  },
  examples: [
    { line: "klieo-bus work letters --exec 'cat'", says: 'prints payloads until Ctrl-C' },
    { line: `klieo-bus work mail --exec 'sendmail -- "$KLIEO_HEADER_TO"' --concurrency 4`, says: 'four at once' },
    { line: "klieo-bus work letters --exec 'cat' --until-empty --json", says: 'a line per job: id, attempt, outcome, exitCode, ms' },
  ],
  async run({ args, options }, session) {
    const { output } = session
    const bus = await session.connect()
    const { Worker } = await import('../../index.ts')
    using interrupts = new Interrupts()
    const { concurrency, count } = options
    const limited = new Limited(bus.jobs, { concurrency, count, untilEmpty: options['until-empty'] }, () => interrupts.end())
    const how = { line: options.exec, output, interrupts }
    const worker = new Worker(limited.jobs, args.queue, (job, signal) => limited.handle(() => handle(job, signal, how)), {
      concurrency,
      leaseTtlMs: options.lease,
      ...(options['worker-id'] === undefined ? {} : { workerId: options['worker-id'] }),
      onError: (error, job) => tell(output, error, job),
    })
    if (process.stderr.isTTY) output.note(output.styleError('dim', `working on "${args.queue}"; Ctrl-C ends it`))
    const readerGone = output.gone.catch((error) => error as unknown)
    await Promise.race([aborted(interrupts.drain), readerGone])
    const stopping = worker.stop({ graceMs: options.grace ?? FOR_EVER_MS })
    await Promise.race([stopping, aborted(interrupts.kill)])
    if (output.isGone) throw await readerGone
    return interrupts.kill.aborted ? EXIT.interrupted : EXIT.done
  },
})

interface HandleOptions {
  readonly line: string
  readonly output: Output
  readonly interrupts: Interrupts
}

async function handle(job: ClaimedJob<never>, signal: AbortSignal, { line, output, interrupts }: HandleOptions): Promise<void> {
  const startedAt = performance.now()
  const { id, queue, attempt, maxAttempts, headers } = job
  const report = async (outcome: 'acked' | 'failed' | 'lost', exitCode: number | null) => {
    if (output.json) await output.object({ queue, id, attempt, outcome, exitCode, ms: Math.round(performance.now() - startedAt) })
  }
  const result = await exec({
    command: line,
    input: job.payload,
    env: {
      KLIEO_QUEUE: queue,
      KLIEO_JOB_ID: id,
      KLIEO_ATTEMPT: String(attempt),
      KLIEO_MAX_ATTEMPTS: String(maxAttempts),
      KLIEO_FENCE: String(job.lease.fence),
      ...headerVariables(headers),
    },
    stop: signal,
    kill: interrupts.kill,
    // With --json standard output is ours.
    onOutput: async (chunk) => (output.json ? void process.stderr.write(chunk) : output.write(chunk)),
    onError: (chunk) => void process.stderr.write(chunk),
  })
  // It was killed by us: the job goes back as it is, with the bus.
  if (interrupts.kill.aborted) return new Promise<never>(() => {})
  if (signal.aborted) {
    await report('lost', result.code)
    throw signal.reason
  }
  if (result.code !== 0) {
    await report('failed', result.code)
    throw new Failure(EXIT.failed, failureOf(result))
  }
  await job.ack()
  await report('acked', 0)
}

function tell(output: Output, error: unknown, job: ClaimedJob | undefined): void {
  if (error instanceof ReaderGone || (isBusFailure(error) && error.code === 'closed')) return
  // What the command wrote has been shown as it wrote it.
  const text = error instanceof Failure ? sentence(error).split(': ', 1)[0] : sentence(error)
  output.warn(job === undefined ? `work: ${text}` : `job ${job.id}, attempt ${job.attempt} of ${job.maxAttempts}: ${text}`)
}

export const COMMANDS = [work]

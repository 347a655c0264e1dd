/** `kv lease`: as flock and timeout do it, the exit code is the command's own, and above 122 ours. */

import { spawn } from 'node:child_process'
import type { Lease } from '../../index.ts'
import { command } from '../command.ts'
import { signalGroup } from '../exec.ts'
import { EXIT, Failure, isBusFailure, sentence } from '../failure.ts'

const HELD = 123
const LOST = 124
const FAILED = 125
const KILL_AFTER_MS = 5_000
/** As shells say it. */
const SIGNAL_BASE = 128
const SIGNALS: Readonly<Record<string, number>> = { SIGHUP: 1, SIGINT: 2, SIGQUIT: 3, SIGABRT: 6, SIGKILL: 9, SIGTERM: 15 }

export const lease = command({
  name: 'kv lease',
  summary: 'run a command while holding a lease',
  details:
    'The lease is extended while the command runs, and released when it has ended. When it is lost (the server was out of reach for longer than --ttl) the command gets SIGTERM, 5 seconds later SIGKILL. KLIEO_FENCE grows with each grant: hand it to whatever the lease protects.',
  arguments: { bucket: { description: 'the name of the bucket' }, key: { description: 'the key' } },
  options: {
    exec: { type: 'command', value: 'COMMAND', description: 'what to run, with KLIEO_FENCE, KLIEO_BUCKET and KLIEO_KEY', required: true },
    ttl: { type: 'duration', value: 'TIME', description: 'how long the lease outlives a holder that dies', default: '30s' },
    wait: { type: 'duration', value: 'TIME', description: 'how long to wait for whoever holds it', default: '0s' },
  },
  examples: [
    { line: "klieo-bus kv lease locks nightly --exec './report.sh'", says: 'on one machine of many' },
    { line: "klieo-bus kv lease locks deploy --wait 10m --exec 'make deploy'", says: 'one after the other' },
  ],
  exitCodes: {
    [HELD]: 'somebody else holds the lease; the command was not run',
    [LOST]: 'the lease was lost while the command ran',
    [FAILED]: 'no lease for another reason; else the exit code of the command',
  },
  async run({ args, options }, session) {
    const { output } = session
    using signals = new Signals()
    const stopped = () => new Failure(EXIT.interrupted, 'interrupted; the command was not run')
    let held: Lease
    try {
      const bus = await session.connect()
      held = await bus.kv.lease(args.bucket, args.key, options.ttl, { waitMs: options.wait, signal: signals.interrupted })
    } catch (error) {
      if (signals.interrupted.aborted) throw stopped()
      if (isBusFailure(error) && error.code === 'invalid_argument') throw error
      throw new Failure(isBusFailure(error) && error.code === 'lease_held' ? HELD : FAILED, sentence(error), { cause: error })
    }
    const stopBeating = keep(held, options.ttl)
    try {
      if (signals.interrupted.aborted) throw stopped()
      const ended = await run(
        options.exec,
        { KLIEO_FENCE: String(held.fence), KLIEO_BUCKET: args.bucket, KLIEO_KEY: args.key },
        held.signal,
        signals,
        output.json,
      )
      if (held.signal.aborted) throw new Failure(LOST, `the lease on "${args.key}" was lost while the command ran [lease_lost]`)
      if (output.json) await output.object({ bucket: args.bucket, key: args.key, fence: held.fence, exitCode: ended })
      return ended
    } finally {
      stopBeating()
      await held.release().catch((error) => output.warn(`the lease ends with its time: ${sentence(error)}`))
    }
  },
})

const FORWARDED = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const

/** Heard from beginning to end, so that none ends this process between two listeners: they go to the command, once there is one. */
class Signals implements Disposable {
  readonly #interrupted = new AbortController()
  readonly #onSignal = (signal: NodeJS.Signals) => {
    if (this.toCommand === undefined) {
      // A server that does not answer is waited for once.
      if (this.#interrupted.signal.aborted) process.exit(EXIT.interrupted)
      this.#interrupted.abort()
    }
    // In the foreground of a terminal the command has it already.
    else if (signal !== 'SIGINT' || !process.stdin.isTTY) this.toCommand(signal)
  }
  /** Where they go, as long as the command runs. */
  toCommand: ((signal: NodeJS.Signals) => void) | undefined

  constructor() {
    for (const signal of FORWARDED) process.on(signal, this.#onSignal)
  }

  /** Aborted by one that comes while there is no command. */
  get interrupted(): AbortSignal {
    return this.#interrupted.signal
  }

  [Symbol.dispose](): void {
    for (const signal of FORWARDED) process.off(signal, this.#onSignal)
  }
}

/** A beat that fails is followed by the next; the lease's own signal tells when it is too late. */
function keep(held: Lease, ttlMs: number): () => void {
  const timer = setInterval(() => held.heartbeat().catch(() => {}), Math.max(10, ttlMs / 3))
  return () => clearInterval(timer)
}

/**
 * On a terminal in the foreground: it has the terminal, and Ctrl-C there reaches it without our help. Elsewhere in a process group of its
 * own: a shell ends with its signal, and what it has started would work on when the lease is somebody else's.
 * @returns its exit code
 */
async function run(line: string, env: Record<string, string>, lost: AbortSignal, signals: Signals, json: boolean): Promise<number> {
  const detached = process.platform !== 'win32' && ![process.stdin, process.stdout, process.stderr].some(({ isTTY }) => isTTY)
  // With --json standard output is ours.
  const stdio = ['inherit', json ? 2 : 'inherit', 'inherit'] as const
  const child = spawn(line, { shell: true, detached, stdio: [...stdio], env: { ...process.env, ...env } })
  const tell = (signal: NodeJS.Signals) => void (detached ? signalGroup(child, signal) : child.kill(signal))
  signals.toCommand = tell
  let timer: NodeJS.Timeout | undefined
  const onLost = () => {
    tell('SIGTERM')
    timer = setTimeout(() => tell('SIGKILL'), KILL_AFTER_MS)
  }
  lost.addEventListener('abort', onLost)
  if (lost.aborted) onLost()
  try {
    const { promise, resolve, reject } = Promise.withResolvers<number>()
    child.on('error', (error) => reject(new Failure(FAILED, `the command could not be started: ${error.message}`)))
    child.on('exit', (code, signal) => resolve(code ?? SIGNAL_BASE + (SIGNALS[signal!] ?? 0)))
    return await promise
  } finally {
    signals.toCommand = undefined
    clearTimeout(timer)
    lost.removeEventListener('abort', onLost)
  }
}

/** Rates, latencies and CPU of one stretch of work, as plain data that a child process hands to its parent. */

import { readdirSync, readFileSync } from 'node:fs'
import { performance } from 'node:perf_hooks'
import { setImmediate as nextTurn } from 'node:timers/promises'

export interface Metric {
  /** As in the table, such as `32 callers`. */
  readonly name: string
  readonly value: number
  readonly unit: string
  /** Cores kept busy while it was measured: by the measuring process, and by the server where its processes can be seen. */
  readonly cpu?: Cpu
  /** The plot it is a point of, and where. */
  readonly plot?: { readonly plot: string; readonly x: number; readonly line?: string }
}

export interface Cpu {
  readonly client: number
  readonly server?: number
}

/** Of /proc: a hundredth of a second. */
const TICKS_PER_SECOND = 100

/** @returns seconds of CPU that a process and its children, gone ones too, have used; undefined where there is no /proc */
export function cpuSecondsOf(pid: number | undefined): number | undefined {
  if (pid === undefined) return undefined
  const own = readStat(pid)
  if (!own) return undefined
  let ticks = own.ticks + own.endedChildren
  for (const name of readdirSync('/proc')) {
    if (!/^\d+$/.test(name)) continue
    const stat = readStat(Number(name))
    if (stat?.parent === pid) ticks += stat.ticks
  }
  return ticks / TICKS_PER_SECOND
}

function readStat(pid: number): { parent: number; ticks: number; endedChildren: number } | undefined {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'utf8')
    // The name before may hold spaces and parentheses.
    const fields = text.slice(text.lastIndexOf(')') + 2).split(' ')
    const [parent, utime, stime, cutime, cstime] = [1, 11, 12, 13, 14].map((index) => Number(fields[index])) as [
      number,
      number,
      number,
      number,
      number,
    ]
    return { parent, ticks: utime + stime, endedChildren: cutime + cstime }
  } catch {
    return undefined
  }
}

export class Stopwatch {
  readonly #serverPid: number | undefined
  readonly #started = performance.now()
  readonly #client = process.cpuUsage()
  readonly #server: number | undefined

  constructor(serverPid: number | undefined) {
    this.#serverPid = serverPid
    this.#server = cpuSecondsOf(serverPid)
  }

  stop(): { seconds: number; cpu: Cpu } {
    const seconds = (performance.now() - this.#started) / 1_000
    const { user, system } = process.cpuUsage(this.#client)
    const server = cpuSecondsOf(this.#serverPid)
    const cpu: Cpu = {
      client: (user + system) / 1e6 / seconds,
      ...(server === undefined || this.#server === undefined ? {} : { server: (server - this.#server) / seconds }),
    }
    return { seconds, cpu }
  }
}

/**
 * `callers` loops that call one after the other, for `ms`.
 * @returns calls that were answered
 */
export async function callConcurrently(
  callers: number,
  ms: number,
  call: (caller: number, turn: number) => Promise<unknown>,
): Promise<number> {
  const end = performance.now() + ms
  let calls = 0
  await Promise.all(
    Array.from({ length: callers }, async (_, caller) => {
      for (let turn = 0; performance.now() < end; turn++) {
        await call(caller, turn)
        calls++
        // An answer from memory must not starve the timers and sockets of the others.
        if ((turn & 255) === 255) await nextTurn()
      }
    }),
  )
  return calls
}

/** @param weight units in a call, such as jobs */
export async function rate(
  name: string,
  unit: string,
  options: {
    readonly callers: number
    readonly ms: number
    readonly warmUpMs: number
    readonly weight?: number
    readonly serverPid?: number | undefined
    readonly plot?: Metric['plot'] | undefined
  },
  call: (caller: number, turn: number) => Promise<unknown>,
): Promise<Metric> {
  await callConcurrently(options.callers, options.warmUpMs, call)
  const watch = new Stopwatch(options.serverPid)
  const calls = await callConcurrently(options.callers, options.ms, call)
  const { seconds, cpu } = watch.stop()
  return { name, unit, value: (calls * (options.weight ?? 1)) / seconds, cpu, ...(options.plot ? { plot: options.plot } : {}) }
}

/** How long `count` units take, as a rate. */
export async function timed(
  name: string,
  unit: string,
  count: number,
  serverPid: number | undefined,
  work: () => Promise<unknown>,
): Promise<Metric> {
  const watch = new Stopwatch(serverPid)
  await work()
  const { seconds, cpu } = watch.stop()
  return { name, unit, value: count / seconds, cpu }
}

export function quantile(sorted: readonly number[], share: number): number {
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? Number.NaN
}

const PLOTTED_SHARES = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999]

/** p50 and p99 in ms, and the distribution for a plot. */
export function latencies(name: string, values: readonly number[], cpu: Cpu, plot?: string): Metric[] {
  const sorted = [...values].sort((a, b) => a - b)
  const points = PLOTTED_SHARES.filter((share) => share <= 1 - 1 / sorted.length).map(
    (share): Metric => ({
      name: `${name} p${+(share * 100).toFixed(1)}`,
      unit: 'ms',
      value: quantile(sorted, share),
      ...(plot === undefined ? {} : { plot: { plot, x: share * 100 } }),
      ...(share === 0.5 ? { cpu } : {}),
    }),
  )
  return points
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2
}

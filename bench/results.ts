/** What a run found, as it stands in the JSON file. */

import { type Cpu, type Metric, median } from './measure.ts'

export interface Row {
  readonly scenario: string
  readonly contender: string
  readonly metric: string
  readonly unit: string
  readonly median: number
  readonly min: number
  readonly max: number
  /** One a run, in their order: runs with the same number were next to each other. */
  readonly values: readonly number[]
  readonly cpu?: Cpu
  readonly plot?: Metric['plot']
}

export interface ContenderInfo {
  readonly version: string
  readonly settings: string
  readonly server: string
  readonly peer: boolean
}

export interface Results {
  readonly date: string
  readonly machine: string
  readonly versions: Readonly<Record<string, string>>
  readonly serverSettings: Readonly<Record<string, string>>
  readonly quick: boolean
  readonly runs: number
  readonly minutes: number
  readonly contenders: Readonly<Record<string, ContenderInfo>>
  readonly rows: readonly Row[]
  /** What could not be measured, and why. */
  readonly failures: readonly string[]
}

interface Sample {
  readonly scenario: string
  readonly contender: string
  readonly metric: Metric
}

/** In the order in which they were first met. */
export function toRows(samples: readonly Sample[]): Row[] {
  const groups = new Map<string, Sample[]>()
  for (const sample of samples) {
    const key = JSON.stringify([sample.scenario, sample.contender, sample.metric.name])
    groups.set(key, [...(groups.get(key) ?? []), sample])
  }
  return [...groups.values()].map((group) => {
    const [{ scenario, contender, metric }] = group as [Sample]
    const values = group.map(({ metric: { value } }) => round(value))
    const client = group.flatMap(({ metric: { cpu } }) => (cpu && Number.isFinite(cpu.client) ? [cpu.client] : []))
    const server = group.flatMap(({ metric: { cpu } }) => (cpu?.server === undefined ? [] : [cpu.server]))
    return {
      scenario,
      contender,
      metric: metric.name,
      unit: metric.unit,
      median: round(median(values)),
      min: Math.min(...values),
      max: Math.max(...values),
      values,
      ...(client.length + server.length === 0
        ? {}
        : {
            cpu: {
              client: client.length === 0 ? 0 : round(median(client)),
              ...(server.length === 0 ? {} : { server: round(median(server)) }),
            },
          }),
      ...(metric.plot === undefined ? {} : { plot: metric.plot }),
    }
  })
}

/** Four digits say all that such a measurement can. */
function round(value: number): number {
  return Number(value.toPrecision(4))
}

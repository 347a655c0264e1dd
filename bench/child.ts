/** One scenario with one contender, in a process of its own: `node bench/child.ts '<task as JSON>'`. Answers by IPC. */

import type { Contender } from './contenders.ts'
import type { Metric } from './measure.ts'
import { loadPeers, noPeers, own, scenarios } from './registry.ts'
import type { ComparedScenario, Kind, Sessions, Setting } from './scenario.ts'

export interface Task {
  readonly scenario: string
  readonly contender: string
  readonly peers: boolean
  readonly setting: Setting
}

export type Answer = { readonly metrics: readonly Metric[] } | { readonly failure: string }

async function run({ scenario: name, contender, peers, setting }: Task): Promise<readonly Metric[]> {
  const scenario = scenarios.find((candidate) => candidate.name === name)
  if (!scenario) throw new Error(`there is no scenario "${name}"`)
  if (scenario.kind === 'own') return scenario.contenders[contender]!(setting)
  const others = peers ? (await loadPeers()).peers : noPeers
  return compare(scenario as ComparedScenario, [...own[scenario.kind], ...others[scenario.kind]], contender, setting)
}

async function compare<K extends Kind>(
  scenario: ComparedScenario<K>,
  contenders: readonly unknown[],
  name: string,
  setting: Setting,
): Promise<Metric[]> {
  const contender = (contenders as readonly Contender<Sessions[K]>[]).find((candidate) => candidate.name === name)
  if (!contender) throw new Error(`there is no contender "${name}"`)
  const session = await contender.open(setting.servers)
  const metrics = await scenario.measure(session, setting, contender)
  await session[Symbol.asyncDispose]()
  return metrics
}

function answer(value: Answer): void {
  // Whatever a peer leaves running ends here.
  process.send!(value, () => process.exit())
}

try {
  answer({ metrics: await run(JSON.parse(process.argv[2]!) as Task) })
} catch (error) {
  answer({ failure: error instanceof Error ? (error.stack ?? error.message) : String(error) })
}

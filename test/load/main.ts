/**
 * `npm run load -- [options]`: what is much of one thing. Each scenario has a server of its own, prints what it measures beside
 * its bound, and the run fails when a bound is broken. docs/load.md tells what was found.
 *
 *   --only a,b           these scenarios
 *   --quick              a tenth of everything, for CI, under a minute
 *   --postgres <dir>     an installed server, such as /usr/lib/postgresql/15/bin; default: the embedded one
 */

import { availableParallelism } from 'node:os'
import { parseArgs } from 'node:util'
import { session } from '../support/sessions.ts'
import { Ledger, line } from './ledger.ts'
import { Cast, type Load, type Scenario } from './scenario.ts'
import { scenarios } from './scenarios/index.ts'
import { startServer } from './server.ts'

const WITHIN_MS = 5 * 60_000

const { values: options } = parseArgs({
  options: { only: { type: 'string' }, quick: { type: 'boolean', default: false }, postgres: { type: 'string' } },
})
const only = options.only?.split(',')
for (const name of only ?? []) {
  if (!scenarios.some((scenario) => scenario.name === name)) {
    throw new Error(`--only: there is no "${name}"; there are ${scenarios.map((scenario) => scenario.name).join(', ')}`)
  }
}

const ledger = new Ledger()
const casts = new Set<Cast>()
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => {
    for (const cast of casts) cast.child.signal('SIGKILL')
    // The servers end with this process.
    process.exit(130)
  })
}

const began = performance.now()
let version = ''
for (const scenario of scenarios) {
  if (only && !only.includes(scenario.name)) continue
  const startedAt = performance.now()
  ledger.begin(scenario.name, scenario.title)
  try {
    await play(scenario)
  } catch (error) {
    ledger.broke('the scenario did not end', error instanceof Error ? (error.stack ?? error.message) : String(error))
  }
  for (const cast of casts) await cast.child.kill()
  casts.clear()
  process.stdout.write(`  ${((performance.now() - startedAt) / 1_000).toFixed(0)} s\n`)
}

const minutes = ((performance.now() - began) / 60_000).toFixed(1)
process.stdout.write(`\nPostgreSQL ${version}, Node.js ${process.versions.node}, ${availableParallelism()} cores, ${minutes} minutes\n`)
if (ledger.broken.length > 0) process.stdout.write(`${ledger.broken.map((entry) => `${entry.scenario}\n${line(entry)}`).join('\n')}\n`)
process.stdout.write(`${ledger.held} held, ${ledger.broken.length} broken\n`)
process.exitCode = ledger.broken.length > 0 || ledger.held === 0 ? 1 : 0

async function play(scenario: Scenario): Promise<void> {
  await using server = await startServer(options.postgres, scenario.settings)
  version = server.version
  await using client = await session(server.url, { applicationName: 'load observer' })
  const load: Load = {
    server,
    client,
    ledger,
    quick: options.quick,
    size: (whole, quick) => (options.quick ? quick : whole),
    start(actor, given) {
      const cast = new Cast(scenario.name, actor, { url: server.url, quick: options.quick, ...(given as object) })
      casts.add(cast)
      return cast
    },
  }
  const { promise: late, reject } = Promise.withResolvers<never>()
  const timer = setTimeout(() => reject(new Error(`not within ${WITHIN_MS / 60_000} minutes`)), WITHIN_MS)
  try {
    await Promise.race([scenario.run(load), late])
  } finally {
    clearTimeout(timer)
  }
}

/**
 * A process of a scenario's own: `node test/load/actor.ts <scenario> <actor> <arguments as JSON>`. It runs one of the scenario's
 * `actors`, and its last line tells what that answered and how large the process ever was.
 */

import { createInterface } from 'node:readline'
import type { Stage } from './scenario.ts'
import { scenarios } from './scenarios/index.ts'

const [scenario, actor, given] = process.argv.slice(2) as [string, string, string]

const heard: string[] = []
let onLine: (() => void) | undefined
const input = createInterface({ input: process.stdin })
input.on('line', (line) => {
  heard.push(line)
  onLine?.()
})

const stage: Stage = {
  say: (line) => void process.stdout.write(`${JSON.stringify(line)}\n`),
  async cue() {
    while (heard.length === 0) {
      await new Promise<void>((resolve) => {
        onLine = resolve
      })
    }
    heard.shift()
  },
}

const act = scenarios.find(({ name }) => name === scenario)?.actors[actor]
if (!act) throw new Error(`there is no actor "${actor}" in "${scenario}"`)
const answer = await act(JSON.parse(given) as never, stage)
const { rss, heapUsed } = process.memoryUsage()
// The system counts in KiB.
stage.say({ answer: answer ?? null, peakMiB: process.resourceUsage().maxRSS / 1024, rssMiB: rss / 2 ** 20, heapMiB: heapUsed / 2 ** 20 })
input.close()

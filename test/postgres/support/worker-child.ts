/** A Worker in a process of its own whose handler says that it began and never ends; it is there to be killed. */

import { PostgresBus, Worker } from '../../../src/index.ts'

const [connectionString, schema, queue, leaseTtlMs] = process.argv.slice(2) as [string, string, string, string]
const bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
new Worker(
  bus.jobs,
  queue,
  async (job) => {
    process.stdout.write(`${JSON.stringify({ began: job.id, attempt: job.attempt })}\n`)
    await new Promise<never>(() => {})
  },
  { leaseTtlMs: Number(leaseTtlMs) },
)

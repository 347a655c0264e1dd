/** Starts an embedded server and says where; then waits to be ended. Options as JSON in the first argument. */

import { pathToFileURL } from 'node:url'

const { module, idle, ...options } = JSON.parse(process.argv[2] ?? '{}') as { module?: string; idle?: 'leave' }
const { startEmbeddedPostgres } = (await import(
  module === undefined ? '../../src/testing/embedded-postgres.ts' : pathToFileURL(module).href
)) as typeof import('../../src/testing/embedded-postgres.ts')

const { pid, dataDir, connectionString, version } = await startEmbeddedPostgres(options)
process.stdout.write(`${JSON.stringify({ pid, dataDir, connectionString, version })}\n`)
// With nothing left to do this process ends, unless the server keeps it.
if (idle !== 'leave') process.stdin.resume()

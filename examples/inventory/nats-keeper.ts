/**
 * The parent of a nats-server on a free port of loopback, with a store in the temporary directory. It reads its stdin, whose
 * end follows from every end of main.ts, `kill -9` included: then it ends the server and removes the store. So the server
 * stays only when this very process is killed with kill -9.
 *
 *     node nats-keeper.ts      prints host:port once the server is ready
 */

import { spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'

const END_WITHIN_MS = 5_000

const store = mkdtempSync(join(tmpdir(), 'klieo-inventory-'))
const server = spawn('nats-server', ['-js', '-a', '127.0.0.1', '-p', '-1', '-sd', store], { stdio: ['ignore', 'ignore', 'pipe'] })

let ready = false
let ending = false
let address = ''
let last = ''
createInterface({ input: server.stderr }).on('line', (line) => {
  last = line
  address = /Listening for client connections on (\S+)/.exec(line)?.[1] ?? address
  if (!line.includes('Server is ready')) return
  ready = true
  process.stdout.write(`${address}\n`)
})
server.on('error', (error) => {
  last = error.message
})
server.on('close', () => {
  if (!ready && !ending) process.stderr.write(`nats-server: ${last}\n`)
  rmSync(store, { recursive: true, force: true, maxRetries: 5 })
  process.exit()
})

function end(): void {
  ending = true
  server.kill()
  setTimeout(() => server.kill('SIGKILL'), END_WITHIN_MS)
}

// Nobody reads any more.
process.stdout.on('error', () => {})
process.stdin.on('end', end).on('error', end).resume()
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, end)

/** A bus process beside pgbench: see scenarios/wake-ups.ts. Told `ringing` or `silent`, it answers how often it rang since. */

import { setTimeout as pause } from 'node:timers/promises'
import pg from 'pg'
import { PostgresBus } from '../dist/index.js'

const RING_EVERY_MS = 5

const connectionString = process.argv[2]!
const end = new AbortController()
let ended = false
const bus = await PostgresBus.connect({ connectionString })
const QUEUE = 'bench-bell'
const waiting = (async () => {
  // Woken, it looks and finds nothing.
  while (!ended) await bus.jobs.claim(QUEUE, 'bystander', 30_000, { waitMs: 30_000, signal: end.signal })
})()
// Another process as far as the waiting one can tell: its own rings would not travel through the server.
const other = new pg.Client({ connectionString })
await other.connect()
const { rows } = await other.query<{ channel: string }>(`select 'klieo_' || left(encode(sha256('klieo'), 'hex'), 16) as channel`)
const notify = {
  name: 'ring',
  text: 'select pg_notify($1, $2)',
  values: [rows[0]!.channel, JSON.stringify({ from: 'bench', topics: [`queue:${QUEUE}`] })],
}

let ringing = false
let rings = 0
const loop = (async () => {
  while (!ended) {
    if (ringing) {
      await other.query(notify)
      rings++
    }
    await pause(RING_EVERY_MS)
  }
})()

process.on('message', (state) => {
  ringing = state === 'ringing'
  process.send!(rings)
  rings = 0
})
process.on('disconnect', async () => {
  ended = true
  end.abort()
  await loop
  await other.end()
  await waiting
  await bus.close()
})
process.send!('ready')

/** A bus process beside pgbench: see scenarios/wake-ups.ts. Told `ringing` or `silent`, it answers how often it rang since. */

import { setTimeout as pause } from 'node:timers/promises'
import pg from 'pg'
import { PostgresBus } from '../dist/index.js'

const RING_EVERY_MS = 5

const connectionString = process.argv[2]!
const bus = await PostgresBus.connect({ connectionString })
const stream = await bus.pubsub.subscribe('bench.bell', 'bench-bystander', { start: 'new' })
const consuming = (async () => {
  for await (const msg of stream) await msg.ack()
})()
// Another process as far as the subscriber can tell: its own rings would not travel through the server.
const other = new pg.Client({ connectionString })
await other.connect()
const { rows } = await other.query<{ channel: string }>(`select 'klieo_' || left(encode(sha256('klieo'), 'hex'), 16) as channel`)
const notify = {
  name: 'ring',
  text: 'select pg_notify($1, $2)',
  values: [rows[0]!.channel, JSON.stringify({ from: 'bench', topics: ['message:bench.bell'] })],
}

let ringing = false
let ended = false
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
  await loop
  await other.end()
  await bus.close()
  await consuming
})
process.send!('ready')

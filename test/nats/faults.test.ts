/** Who dies, stands still or writes nonsense, and what a bus then must not do. */

import { connect as connectSocket, createServer, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { jetstream, jetstreamManager } from '@nats-io/jetstream'
import { Kvm } from '@nats-io/kv'
import { connect, headers, type NatsConnection } from '@nats-io/transport-node'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { NatsBus } from '../../src/nats/index.ts'
import { type NatsServer, ownNatsServer, publishRaw, whyNoOwnNats } from '../support/nats-server.ts'
import { eventually } from '../support/wait.ts'

const missing = whyNoOwnNats()
const LONG_TTL_MS = 60_000
setFlagsFromString('--expose-gc')
const collectGarbage = runInNewContext('gc') as () => void
const text = (bytes: Uint8Array) => Buffer.from(bytes).toString()

describe.skipIf(missing !== undefined)(`faults around NATS${missing === undefined ? '' : ` (${missing})`}`, () => {
  let server: NatsServer
  let bus: NatsBus
  let nc: NatsConnection

  beforeAll(async () => {
    server = await ownNatsServer()
    bus = await NatsBus.connect({ servers: server.url })
    nc = await connect({ servers: server.url, maxReconnectAttempts: -1, reconnectTimeWait: 100 })
  })

  afterAll(async () => {
    await bus?.close()
    await nc?.close()
    await server?.remove()
  })

  /** Away and back: connections are new, and what was asked of the server is forgotten. */
  const restart = async () => {
    await server.stop()
    await server.start()
  }

  /** It may have answered what came while it was being stopped. */
  const pause = async () => {
    server.pause()
    await eventually(() => Promise.race([nc.flush().then(() => false), sleep(200, true)]))
  }

  test('what was answered is not remembered: 300 reads of 100 kB leave less than 10 MB', async () => {
    await bus.kv.put('memory', 'k', new Uint8Array(100_000))
    const used = () => {
      collectGarbage()
      return process.memoryUsage().heapUsed + process.memoryUsage().external
    }
    const before = used()
    for (let n = 0; n < 300; n++) await bus.kv.get('memory', 'k')
    await eventually(() => expect(used() - before).toBeLessThan(10e6), { timeoutMs: 2_000 })
  })

  test('A4 a member of a durable that is deleted ends with not_found, and leaves no consumer', async () => {
    const jsm = await jetstreamManager(nc)
    for (let n = 0; n < 10; n++) {
      const stream = await bus.pubsub.subscribe('gone', `gone-${n}`)
      const next = stream[Symbol.asyncIterator]().next()
      next.catch(() => {})
      await bus.pubsub.publish('other', 'x')
      await bus.pubsub.deleteDurable(`gone-${n}`)
      await expect(next).rejects.toMatchObject({ code: 'not_found' })
      await stream.close()
    }
    const names: string[] = []
    for await (const { name } of jsm.consumers.list('klieo_messages')) names.push(name)
    expect(names.filter((name) => name.startsWith('gone-'))).toEqual([])
  })

  test('A4 a durable whose deleter died is none: who subscribes makes it anew', async () => {
    const js = jetstream(nc)
    await bus.pubsub.publish('ending', 'first')
    await (await bus.pubsub.subscribe('ending', 'ending')).close()
    const entries = await new Kvm(js).open('klieo_durables')
    const entry = (await entries.get('ending'))!.json<object>()
    await entries.put('ending', JSON.stringify({ ...entry, ending: true }))
    expect((await bus.admin.durables()).filter(({ durable }) => durable === 'ending')).toEqual([])
    await expect(bus.admin.seekDurable('ending', 'all')).rejects.toMatchObject({ code: 'not_found' })
    const stream = await bus.pubsub.subscribe('ending', 'ending', { start: 'all' })
    const message = (await stream[Symbol.asyncIterator]().next()).value!
    expect([text(message.payload), message.attempt]).toEqual(['first', 1])
    await message.ack()
    await stream.close()
    await entries.put('ending', JSON.stringify({ ...(await entries.get('ending'))!.json<object>(), ending: true }))
    await bus.pubsub.deleteDurable('ending')
    await expect(bus.pubsub.deleteDurable('ending')).rejects.toMatchObject({ code: 'not_found' })
  })

  test('A4 members follow a durable whose mover died before he took the old consumer away', async () => {
    const entries = await new Kvm(jetstream(nc)).open('klieo_durables')
    const stream = await bus.pubsub.subscribe('moved', 'moved')
    const messages = stream[Symbol.asyncIterator]()
    await bus.pubsub.publish('moved', 'first')
    await (await messages.next()).value!.ack()
    const entry = (await entries.get('moved'))!.json<{ consumer: string }>()
    await entries.put('moved', JSON.stringify({ ...entry, consumer: 'moved-by-a-dead-one', start: 'all' }))
    expect(text((await messages.next()).value!.payload)).toBe('first')
    await stream.close()
    const jsm = await jetstreamManager(nc)
    await expect(jsm.consumers.info('klieo_messages', entry.consumer)).rejects.toThrow('not found')
  })

  test('K6 a watch of updates tells no entry that was there, also after a reconnect', async () => {
    await bus.kv.put('updates', 'old', '1')
    const watch = await bus.kv.watch('updates', undefined, { updatesOnly: true })
    const change = watch[Symbol.asyncIterator]().next()
    await restart()
    await eventually(() => bus.kv.put('updates', 'new', '2').then(() => true))
    expect((await change).value).toMatchObject({ operation: 'put', entry: { key: 'new' } })
    await watch.close()
  })

  test('K6 a watch of a bucket that was empty misses no change at a reconnect', async () => {
    const watch = await bus.kv.watch('empty')
    const changes = watch[Symbol.asyncIterator]()
    const first = changes.next()
    // So that what was there, nothing, is read.
    await expect(bus.jobs.claim('none', 'w', LONG_TTL_MS, { waitMs: 500 })).resolves.toBeNull()
    await restart()
    const other = await NatsBus.connect({ servers: server.url })
    await other.kv.put('empty', 'k', '1')
    await other.kv.put('empty', 'k', '2')
    await other.close()
    expect(text((await first).value!.operation === 'put' ? (await first).value!.entry.value : new Uint8Array())).toBe('1')
    await watch.close()
  })

  test('P3 a name of a header that the client refuses to read is no obstacle to a durable, a purge, a key and a responder', async () => {
    for (const payload of ['with', '']) await publishRaw(server.url, 'klieo.msg.name', 'two words: x\r\na: b', payload)
    await bus.pubsub.publish('name', 'then', { headers: { a: 'b' } })
    const stream = await bus.pubsub.subscribe('name', 'name')
    const messages = stream[Symbol.asyncIterator]()
    for (const wanted of [
      ['with', {}],
      ['', {}],
      ['then', { a: 'b' }],
    ]) {
      const message = (await messages.next()).value!
      expect([text(message.payload), message.headers, message.attempt]).toEqual([...wanted, 1])
      await message.ack()
    }
    await stream.close()
    expect(await bus.admin.purgeMessages('name')).toBe(3)
    await publishRaw(server.url, '$KV.klieo_kv.name.k', 'two words: x', 'v')
    expect(text((await bus.kv.get('name', 'k'))!.value)).toBe('v')
    const heard: string[] = []
    await bus.requestReply.respond('name', ({ payload }) => {
      heard.push(text(payload))
      return ''
    })
    await publishRaw(server.url, 'klieo.req.name', 'two words: x', 'asked')
    await eventually(() => heard.length === 1, { timeoutMs: 5_000 })
    expect(heard).toEqual(['asked'])
  })

  test('headers that somebody else wrote into the bus’s own are no obstacle', async () => {
    const js = jetstream(nc)
    for (const value of ['{', '7', '[["a"]]', '[["a",{}]]']) {
      const odd = headers()
      odd.set('klieo-headers', value)
      odd.set('klieo-packed', '3')
      await js.publish('klieo.msg.odd', 'payload', { headers: odd })
    }
    const stream = await bus.pubsub.subscribe('odd', 'odd')
    const messages = stream[Symbol.asyncIterator]()
    for (let n = 0; n < 4; n++) {
      const message = (await messages.next()).value!
      expect([text(message.payload), message.headers]).toEqual(['payload', {}])
      await message.ack()
    }
    await stream.close()
    nc.subscribe('klieo.req.odd', {
      max: 1,
      callback: (_, msg) => {
        const failed = headers()
        failed.set('klieo-failed', 'no JSON')
        msg.respond('', { headers: failed })
      },
    })
    await nc.flush()
    await expect(bus.requestReply.request('odd', '', { timeoutMs: 2_000 })).rejects.toMatchObject({ code: 'handler_failed' })
  })

  test('P6 a message of another client that leaves no room for a letter is buried without what is too much', async () => {
    const small = await ownNatsServer('max_payload: 1MB\n')
    const other = await NatsBus.connect({ servers: small.url })
    const theirs = await connect({ servers: small.url })
    try {
      const given = headers()
      given.set('colour', 'red')
      const payload = new Uint8Array(1_048_576 - 64).fill(7)
      const { seq } = await jetstream(theirs).publish('klieo.msg.large', payload, { headers: given })
      const stream = await other.pubsub.subscribe('large', 'large', { maxDeliver: 1 })
      await (await stream[Symbol.asyncIterator]().next()).value!.nak()
      await stream.close()
      const letters = await other.pubsub.subscribe('large.dlq', 'letters')
      const letter = (await letters[Symbol.asyncIterator]().next()).value!
      expect(letter.headers).toEqual({
        dlq_reason: 'max_deliver_exceeded',
        dlq_subject: 'large',
        dlq_seq: String(seq),
        dlq_attempts: '1',
        dlq_headers_dropped: '1',
        dlq_payload_bytes: String(payload.byteLength),
      })
      expect(Buffer.from(letter.payload).equals(payload.subarray(0, letter.payload.byteLength))).toBe(true)
    } finally {
      await other.close()
      await theirs.close()
      await small.remove()
    }
  })

  test('respond and the close of a responder end while the server stands still, and who was refused answers nothing later', async () => {
    const responder = await bus.requestReply.respond('still', () => 'first')
    let asked = 0
    await pause()
    try {
      const [closed, refused] = await Promise.allSettled([
        responder.close(),
        bus.requestReply.respond('refused', () => {
          asked++
          return ''
        }),
      ])
      expect(closed.status).toBe('fulfilled')
      expect(refused).toMatchObject({ status: 'rejected', reason: { code: 'connection' } })
    } finally {
      server.resume()
    }
    await eventually(() => bus.pubsub.publish('still', '').then(() => true))
    await expect(bus.requestReply.request('refused', '', { timeoutMs: 1_000 })).rejects.toMatchObject({ code: 'not_found' })
    expect(asked).toBe(0)
  })

  for (const how of ['nak', 'deadLetter', 'ack'] as const) {
    test(`J6 a job whose ${how} arrived although its answer was lost does not wait for the end of its lease`, async () => {
      const proxy = await cuttingProxy(server.url, how === 'nak' ? '"is":"ready"' : how === 'ack' ? '"is":"done"' : '"is":"dying"')
      const other = await NatsBus.connect({ servers: proxy.url, jobAckWaitMs: 500 })
      const queue = `lost-${how}`
      const jsm = await jetstreamManager(nc)
      try {
        await other.jobs.enqueue(queue, { payload: 'x' })
        const job = (await other.jobs.claim(queue, 'w', LONG_TTL_MS))!
        if (how === 'nak') await job.nak(0)
        else if (how === 'ack') await job.ack()
        else await job.deadLetter('r')
        expect(proxy.cuts).toBe(1)
        const next = await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 3_000 })
        expect(next?.attempt ?? null).toBe(how === 'nak' ? 2 : null)
        await next?.ack()
        await eventually(async () => {
          const { state } = await jsm.streams.info('klieo_work', { subjects_filter: `klieo.work.${queue}` })
          expect(state.subjects ?? {}).toEqual({})
        })
        if (how === 'deadLetter') {
          const stream = await bus.pubsub.subscribe(`${queue}.dlq`, queue, { start: 'all' })
          expect((await stream[Symbol.asyncIterator]().next()).value!.headers).toMatchObject({ dlq_reason: 'r' })
          await stream.close()
        }
      } finally {
        await other.close()
        await proxy.close()
      }
    })
  }

  test('P5 K6 what takes longer on its way than the server may be silent comes all the same, as the first delivery', async () => {
    const link = await slowLink(server.url, 2_000_000)
    const other = await NatsBus.connect({ servers: link.url })
    const large = await NatsBus.connect({ servers: server.url, maxPayloadBytes: 8 * 1024 * 1024 })
    try {
      const payload = new Uint8Array(8 * 1024 * 1024).fill(7)
      await eventually(() => large.pubsub.publish('slow', payload, { msgId: 'slow' }).then(() => true), { timeoutMs: 20_000 })
      const stream = await other.pubsub.subscribe('slow', 'slow')
      const message = (await stream[Symbol.asyncIterator]().next()).value!
      expect([message.payload.byteLength, message.attempt]).toEqual([payload.byteLength, 1])
      await message.ack()
      await stream.close()
      await eventually(() => large.kv.put('slow', 'k', payload).then(() => true), { timeoutMs: 20_000 })
      const watch = await other.kv.watch('slow')
      const change = (await watch[Symbol.asyncIterator]().next()).value!
      expect(change.operation === 'put' && change.entry.value.byteLength).toBe(payload.byteLength)
      await watch.close()
    } finally {
      await other.close()
      await large.close()
      await link.close()
    }
  }, 120_000)

  test('a bus closes within a second while a listing is under way and the server stands still', async () => {
    const other = await NatsBus.connect({ servers: server.url })
    await pause()
    const listing = other.kv.keys('closing').next()
    listing.catch(() => {})
    try {
      const startedAt = performance.now()
      await other.close()
      const tookMs = performance.now() - startedAt
      await expect(
        Promise.race([
          listing.then(
            () => 'read',
            ({ code }) => code,
          ),
        ]),
      ).resolves.toMatch(/closed|read/)
      expect(tookMs).toBeLessThan(1_000)
    } finally {
      server.resume()
    }
  })

  test('a server that refuses the user for a while is no end of the bus', async () => {
    const strict = await ownNatsServer()
    const other = await NatsBus.connect({ servers: strict.url })
    try {
      await strict.stop()
      const port = strict.url.split(':')[1]
      const gate = await refusingServer(Number(port))
      await eventually(() => gate.refused >= 3)
      await gate.close()
      await strict.start()
      await eventually(() => other.pubsub.publish('again', '').then(() => true), { timeoutMs: 15_000 })
    } finally {
      await other.close()
      await strict.remove()
    }
  })
})

/** One that says what nats-server says to a user that it does not know. */
async function refusingServer(port: number) {
  const gate = { refused: 0, close: async () => {} }
  const listening = createServer((socket) => {
    socket.on('error', () => {})
    socket.write('INFO {"server_id":"x","version":"2.9.10","proto":1,"headers":true,"max_payload":1048576,"auth_required":true}\r\n')
    socket.once('data', () => {
      gate.refused++
      socket.end("-ERR 'Authorization Violation'\r\n")
    })
  })
  await new Promise<void>((resolve) => void listening.listen(port, '127.0.0.1', resolve))
  gate.close = () => new Promise<void>((resolve) => void listening.close(() => resolve()))
  return gate
}

/** What the server says comes with so many bytes a second. */
async function slowLink(target: string, bytesPerSecond: number) {
  const [host = '', port = ''] = target.split(':')
  const sockets = new Set<Socket>()
  const listening = createServer((client) => {
    const upstream = connectSocket(Number(port), host)
    for (const socket of [client, upstream]) {
      sockets.add(socket)
      socket.on('error', () => {})
      socket.on('close', () => {
        client.destroy()
        upstream.destroy()
      })
    }
    client.on('data', (chunk) => upstream.write(chunk))
    upstream.on('data', (chunk) => {
      client.write(chunk)
      upstream.pause()
      setTimeout(() => upstream.resume(), (chunk.byteLength / bytesPerSecond) * 1_000)
    })
  })
  await new Promise<void>((resolve) => void listening.listen(0, '127.0.0.1', resolve))
  const address = listening.address()
  const close = async () => {
    for (const socket of sockets) socket.destroy()
    await new Promise<void>((resolve) => void listening.close(() => resolve()))
  }
  return { url: `127.0.0.1:${typeof address === 'object' && address !== null ? address.port : 0}`, close }
}

/** Passes everything on until the client has written what holds the text; that the server gets, and its answer nobody. */
async function cuttingProxy(target: string, written: string) {
  const [host = '', port = ''] = target.split(':')
  const sockets = new Set<Socket>()
  const proxy = { cuts: 0, url: '', close: async () => {} }
  const listening = createServer((client) => {
    const upstream = connectSocket(Number(port), host)
    let deaf = false
    for (const socket of [client, upstream]) {
      sockets.add(socket)
      socket.on('error', () => {})
      socket.on('close', () => {
        client.destroy()
        upstream.destroy()
      })
    }
    upstream.on('data', (chunk) => {
      if (!deaf) client.write(chunk)
      // It has answered, so it has read.
      else client.destroy()
    })
    client.on('data', (chunk) => {
      if (proxy.cuts === 0 && chunk.includes(written)) {
        proxy.cuts++
        deaf = true
      }
      upstream.write(chunk)
    })
  })
  await new Promise<void>((resolve) => void listening.listen(0, '127.0.0.1', resolve))
  const address = listening.address()
  proxy.url = `127.0.0.1:${typeof address === 'object' && address !== null ? address.port : 0}`
  proxy.close = async () => {
    for (const socket of sockets) socket.destroy()
    await new Promise<void>((resolve) => void listening.close(() => resolve()))
  }
  return proxy
}

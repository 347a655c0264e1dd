/** What a crash between two steps of the adapter leaves, and who does the rest: pubsub.ts, durables.ts, job-records.ts. */

import { randomBytes } from 'node:crypto'
import { jetstream, jetstreamManager } from '@nats-io/jetstream'
import { Kvm } from '@nats-io/kv'
import { connect, headers } from '@nats-io/transport-node'
import { afterAll, describe, expect, test } from 'vitest'
import { NatsBus } from '../../src/nats/index.ts'
import { startChild } from '../support/child.ts'
import { natsServer, whyNoNats } from '../support/nats-server.ts'
import { eventually } from '../support/wait.ts'

const missing = whyNoNats()
const LONG_TTL_MS = 60_000

describe.skipIf(missing !== undefined)(`crashes on NATS${missing === undefined ? '' : ` (${missing})`}`, async () => {
  if (missing !== undefined) return test('skipped', () => {})
  const server = await natsServer()
  const prefix = `t${randomBytes(4).toString('hex')}`
  const bus = await NatsBus.connect({ servers: server.url, prefix, jobAckWaitMs: 300 })
  const nc = await connect({ servers: server.url })
  const js = jetstream(nc)
  const jsm = await jetstreamManager(nc)

  afterAll(async () => {
    await bus.close()
    await nc.close()
    await server.remove()
  })

  const open = async (name: string) => new Kvm(js).open(`${prefix}_${name}`)
  const first = async (subject: string, durable: string, maxDeliver?: number) => {
    const stream = await bus.pubsub.subscribe(subject, durable, maxDeliver === undefined ? {} : { maxDeliver })
    return { stream, next: async () => (await stream[Symbol.asyncIterator]().next()).value! }
  }
  /** Everything on the subject so far, in a durable of its own. */
  const lettersOn = async (subject: string) => {
    const end = randomBytes(4).toString('hex')
    await bus.pubsub.publish(subject, end, { headers: { end: 'yes' } })
    const { stream, next } = await first(subject, `d${randomBytes(4).toString('hex')}`)
    const letters = []
    for (;;) {
      const message = await next()
      await message.ack()
      if (Buffer.from(message.payload).toString() === end) break
      if (message.headers.end === undefined) letters.push(message)
    }
    await stream.close()
    return letters
  }
  const ticketsOf = async (queue: string) =>
    (await jsm.streams.info(`${prefix}_work`, { subjects_filter: `${prefix}.work.${queue}` })).state.subjects ?? {}

  test('P6 a letter that was published before its message was ended stays the only one', async () => {
    const { seq } = await bus.pubsub.publish('p6', 'x')
    const { stream, next } = await first('p6', 'p6', 1)
    const message = await next()
    const durable = (await (await open('durables')).get('p6'))!.json<{ id: string; consumer: string }>()
    // Whoever died here had published this, and the message comes again.
    await js.publish(`${prefix}.msg.p6.dlq`, 'x', { msgID: `klieo:dlq:${durable.id}:${durable.consumer}:${seq}` })
    await message.nak()
    await stream.close()
    expect(await lettersOn('p6.dlq')).toHaveLength(1)
    expect((await bus.admin.durables()).find(({ durable: name }) => name === 'p6')).toMatchObject({
      pending: 0,
      inFlight: 0,
      redelivering: 0,
    })
  })

  test('A1 a durable whose consumer was never made, or went when it was moved, is counted all the same', async () => {
    for (let n = 0; n < 3; n++) await bus.pubsub.publish('a1', 'x')
    const start = { durable: 'a1', filter: 'a1', id: 'i', consumer: 'a1-c', start: 'all', ackWaitMs: 30_000, maxAckPending: 10 }
    await (await open('durables')).put('a1', JSON.stringify(start))
    const counted = async () => (await bus.admin.durables()).find(({ durable }) => durable === 'a1')
    expect(await counted()).toMatchObject({ pending: 3, inFlight: 0 })
    await jsm.consumers.delete(`${prefix}_messages`, 'a1-c')
    await bus.admin.seekDurable('a1', 'all')
    expect(await counted()).toMatchObject({ pending: 3, inFlight: 0 })
    await bus.pubsub.deleteDurable('a1')
    expect(await counted()).toBeUndefined()
  })

  test('P11 a durable whose consumer was never made gets it at the next subscription', async () => {
    await bus.pubsub.publish('p11', 'x')
    const start = { durable: 'p11', filter: 'p11', id: 'i', consumer: 'p11-c', start: 'all', ackWaitMs: 30_000, maxAckPending: 10 }
    await (await open('durables')).put('p11', JSON.stringify(start))
    const { stream, next } = await first('p11', 'p11')
    await (await next()).ack()
    await stream.close()
    await bus.pubsub.deleteDurable('p11')
  })

  test('J1 a job whose enqueuer died before its ticket is enqueued once more by its dedup key', async () => {
    const id = await bus.jobs.enqueue('j1', { payload: 'first', dedupKey: 'k' })
    // Past the duplicate window of the work queue, which remembers the ticket that is taken away here.
    await jsm.streams.update(`${prefix}_work`, { duplicate_window: 100 * 1e6 })
    try {
      await jsm.streams.purge(`${prefix}_work`, { filter: `${prefix}.work.j1` })
      expect(await bus.jobs.claim('j1', 'w', LONG_TTL_MS)).toBeNull()
      await eventually(async () => {
        expect(await bus.jobs.enqueue('j1', { payload: 'second', dedupKey: 'k' })).toBe(id)
        const job = await bus.jobs.claim('j1', 'w', LONG_TTL_MS)
        expect(job?.id).toBe(id)
        expect(Buffer.from(job!.payload).toString()).toBe('first')
        await job!.ack()
      })
    } finally {
      await jsm.streams.update(`${prefix}_work`, { duplicate_window: 120_000 * 1e6 })
    }
  })

  test('J1 a job without a ticket is claimed after a while, but not one whose key is an earlier job’s', async () => {
    const first = await bus.jobs.enqueue('stranded', { payload: 'first', dedupKey: 'k' })
    const lost = await bus.jobs.enqueue('stranded', { payload: 'lost' })
    // Whoever enqueued these died before the ticket, and before finding that the key is taken.
    await jsm.streams.purge(`${prefix}_work`, { filter: `${prefix}.work.stranded` })
    const second = `${BigInt(lost) - 1n}`
    const given = headers()
    for (const [name, value] of [
      ['klieo-max-attempts', '5'],
      ['klieo-priority', '0'],
      ['klieo-dedup-key', Buffer.from('k').toString('base64url')],
    ] as const)
      given.set(name, value)
    await js.publish(`$KV.${prefix}_jobs.stranded.${second}.data`, 'second', { headers: given })
    const claimed: string[] = []
    await eventually(async () => {
      const job = await bus.jobs.claim('stranded', 'w', LONG_TTL_MS)
      if (!job) return false
      claimed.push(job.id)
      await job.ack()
      return claimed.length === 2
    })
    expect(claimed.sort()).toEqual([first, lost])
    expect(await bus.jobs.claim('stranded', 'w', LONG_TTL_MS)).toBeNull()
    expect(await ticketsOf('stranded')).toEqual({})
    expect((await bus.admin.job(second))?.state).toBe('ready')
  })

  test('a bus that closes leaves the rest of many jobs without a ticket to others', async () => {
    const count = 4_000
    await using sweeper = await NatsBus.connect({ servers: server.url, prefix, jobAckWaitMs: 300 })
    const tickets = async () => Object.values(await ticketsOf('many')).reduce((sum, n) => sum + n, 0)
    for (let n = 0; n < count; n += 1_000)
      await bus.jobs.enqueueMany(
        'many',
        Array.from({ length: 1_000 }, () => ({ payload: '' })),
      )
    await jsm.streams.purge(`${prefix}_work`, { filter: `${prefix}.work.many` })
    await eventually(async () => (await tickets()) > 0 || (await sweeper.jobs.claim('many', 'w', LONG_TTL_MS)) !== null)
    await sweeper.close()
    expect(await tickets()).toBeLessThan(count / 2)
    await bus.admin.purgeQueue('many')
  })

  test('A2 a job whose retrier died before its ticket is claimed after a while', async () => {
    const id = await bus.jobs.enqueue('retrier', { payload: 'x' })
    await (await bus.jobs.claim('retrier', 'w', LONG_TTL_MS))!.deadLetter('r')
    const state = { is: 'ready', attempts: 0, dueAt: Date.now(), round: 1 }
    await (await open('jobs')).put(`retrier.${id}.state`, JSON.stringify(state))
    const job = await eventually(() => bus.jobs.claim('retrier', 'w', LONG_TTL_MS))
    expect(job?.id).toBe(id)
    await job!.ack()
  })

  test('J1 a ticket too many gives no job twice, and goes', async () => {
    const id = await bus.jobs.enqueue('more', { payload: 'x' })
    for (const extra of ['a', 'b']) await js.publish(`${prefix}.work.more`, id, { msgID: extra })
    const job = await bus.jobs.claim('more', 'w', 4_000)
    expect(job?.id).toBe(id)
    expect(await bus.jobs.claim('more', 'w', LONG_TTL_MS)).toBeNull()
    await job!.ack()
    await eventually(
      async () => {
        expect(await bus.jobs.claim('more', 'w', LONG_TTL_MS)).toBeNull()
        expect(await ticketsOf('more')).toEqual({})
      },
      { timeoutMs: 20_000 },
    )
  })

  test('J3 a holder that died after its ack and before the end of the ticket has done the job', async () => {
    const id = await bus.jobs.enqueue('done', { payload: 'x' })
    const state = { is: 'done', attempts: 1, dueAt: 0, round: 0 }
    await (await open('jobs')).put(`done.${id}.state`, JSON.stringify(state))
    expect(await bus.admin.job(id)).toBeNull()
    expect(await bus.jobs.claim('done', 'w', LONG_TTL_MS)).toBeNull()
    expect(await ticketsOf('done')).toEqual({})
    expect(await (await open('jobs')).get(`done.${id}.data`)).toBeNull()
  })

  for (const [how, published] of [
    ['before', false],
    ['after', true],
  ] as const) {
    test(`J4 of a holder that died ${how} the letter there is one letter, and the job is dead`, async () => {
      const queue = `dying-${how}`
      const id = await bus.jobs.enqueue(queue, { payload: 'x' })
      const state = { is: 'dying', attempts: 1, dueAt: 0, round: 0, reason: 'of old age', diedAt: Date.now() }
      await (await open('jobs')).put(`${queue}.${id}.state`, JSON.stringify(state))
      if (published) await js.publish(`${prefix}.msg.${queue}.dlq`, 'x', { msgID: `klieo:dead:${id}:0` })
      expect(await bus.jobs.claim(queue, 'w', LONG_TTL_MS)).toBeNull()
      expect(await lettersOn(`${queue}.dlq`)).toHaveLength(1)
      expect((await bus.admin.job(id))?.state).toBe('dead')
      expect(await ticketsOf(queue)).toEqual({})
      await bus.admin.retryJob(id)
      await (await bus.jobs.claim(queue, 'w', LONG_TTL_MS))!.deadLetter('again')
      // A retried job that dies anew has a letter of its own.
      expect(await lettersOn(`${queue}.dlq`)).toHaveLength(2)
    })
  }

  test('A2 a job that was retried and has no ticket gets one when it is retried once more', async () => {
    const id = await bus.jobs.enqueue('retried', { payload: 'x' })
    await jsm.streams.purge(`${prefix}_work`, { filter: `${prefix}.work.retried` })
    for (let round = 0; round < 2; round++) {
      await bus.admin.retryJob(id)
      const job = await bus.jobs.claim('retried', 'w', LONG_TTL_MS)
      expect(job?.id).toBe(id)
      if (round === 0) await job!.deadLetter('r')
    }
  })

  test('J3 the job of a worker killed with kill -9 comes back at the end of its lease, with the next attempt', async () => {
    await bus.jobs.enqueue('killed', { payload: 'x' })
    await using child = startChild(new URL('./support/holder-child.ts', import.meta.url), { args: [server.url, prefix, 'killed', '1500'] })
    const { askedAt } = await child.next<{ askedAt: number }>(({ attempt }) => attempt === 1)
    const claimedAt = Date.now()
    await child.kill('SIGKILL')
    const job = await bus.jobs.claim('killed', 'w', LONG_TTL_MS, { waitMs: 10_000 })
    const cameAt = Date.now()
    expect(job?.attempt).toBe(2)
    // Two processes know the time of the server nearly alike.
    expect(cameAt - askedAt).toBeGreaterThan(1_300)
    expect(cameAt - claimedAt).toBeLessThan(4_000)
    await job!.ack()
  })

  test('section 7: a closed bus keeps no process alive', async () => {
    await using child = startChild(new URL('./support/idle-child.ts', import.meta.url), { args: [server.url, `${prefix}i`] })
    await child.next(({ closed }) => closed === true)
    const closedAt = performance.now()
    expect((await child.exited).code).toBe(0)
    expect(performance.now() - closedAt).toBeLessThan(3_000)
  })

  test('a message of any NATS client is a message of the bus, and the other way round', async () => {
    const { stream, next } = await first('any.*', 'any')
    const given = headers()
    given.set('colour', 'red')
    await js.publish(`${prefix}.msg.any.one`, 'hello', { headers: given })
    const message = await next()
    expect([message.subject, Buffer.from(message.payload).toString(), message.headers]).toEqual(['any.one', 'hello', { colour: 'red' }])
    await message.ack()
    await stream.close()
    const heard = nc.subscribe(`${prefix}.msg.any.two`, { max: 1 })
    await nc.flush()
    await bus.pubsub.publish('any.two', 'back', { headers: { colour: 'blue' }, msgId: 'two' })
    for await (const msg of heard)
      expect([msg.string(), msg.headers?.get('colour'), msg.headers?.get('Nats-Msg-Id')]).toEqual(['back', 'blue', 'two'])
  })
})

/** What each kind of role can do with a bus and with SQL, and how it is told what it cannot. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { BusError, type ClaimedJob, type Msg, type PostgresBus, type PostgresTx } from '../../src/index.ts'
import { eventually } from '../support/wait.ts'
import { type Login, RolesStage, stateOf } from './support/roles-stage.ts'

const TTL_MS = 60_000
const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes)

let stage: RolesStage
let worker: PostgresBus
let producer: PostgresBus
let reader: PostgresBus
let admin: PostgresBus

beforeAll(async () => {
  stage = await RolesStage.open()
  ;[worker, producer, reader, admin] = (await Promise.all(
    (['worker', 'producer', 'reader', 'admin'] as const).map((kind) => stage.connect(kind)),
  )) as [PostgresBus, PostgresBus, PostgresBus, PostgresBus]
})

afterAll(async () => {
  await Promise.all([worker, producer, reader, admin].map((bus) => bus?.close()))
  await stage[Symbol.asyncDispose]()
})

let count = 0
const unique = (prefix: string) => `${prefix}${++count}`

/** @returns the error, which must say who lacks what, and how he gets it */
async function denied(login: Login, kind: string, promise: Promise<unknown>): Promise<BusError> {
  const error = await promise.then(
    (value) => value,
    (reason: unknown) => reason,
  )
  expect(error).toBeInstanceOf(BusError)
  expect((error as BusError).code).toBe('permission_denied')
  expect((error as BusError).message).toContain(`"${stage.login(login)}"`)
  expect((error as BusError).message).toContain(`select ${stage.schema}.grant_role('${kind}', '${stage.login(login)}')`)
  return error as BusError
}

async function first<T>(elements: AsyncIterable<T>): Promise<T> {
  for await (const element of elements) return element
  throw new Error('it ended')
}

async function drain(elements: AsyncIterable<unknown>): Promise<unknown[]> {
  const all: unknown[] = []
  for await (const element of elements) all.push(element)
  return all
}

/** What takes a worker, for those that are none. */
function consuming(bus: PostgresBus): (readonly [string, () => Promise<unknown>])[] {
  return [
    ['find_durable', () => bus.pubsub.subscribe('a', unique('d'))],
    ['take_jobs', () => bus.jobs.claim('q', 'w', TTL_MS)],
    ['kv_write', () => bus.kv.put('b', 'k', 'x')],
    ['kv_write', () => bus.kv.cas('b', 'k', 'x', null)],
    ['kv_write', () => bus.kv.delete('b', 'k')],
    ['kv_entries_at', () => bus.kv.watch('b')],
    ['take_lease', () => bus.kv.lease('b', 'k', TTL_MS)],
    ['new_instance', () => bus.requestReply.respond('a', () => '')],
  ]
}

describe('a producer', () => {
  test('publishes, in its own transactions too', async () => {
    const subject = unique('s')
    await using client = await stage.session('producer')
    await producer.pubsub.publish(subject, '1')
    await producer.pubsub.publishMany([
      { subject, payload: '2', headers: { a: 'b' } },
      { subject, payload: '3', msgId: unique('id') },
    ])
    const msgId = unique('id')
    const { seq } = await producer.pubsub.publish(subject, '4', { msgId })
    expect(await producer.pubsub.publish(subject, '5', { msgId })).toEqual({ seq, duplicate: true })
    await client.query('begin')
    await producer.pubsub.publish(subject, '6', { tx: client })
    await client.query(`select ${stage.schema}.publish($1, '7')`, [subject])
    await client.query('commit')
    const rows = await stage.rows<{ payload: string }>(
      'select payload_text as payload from klieo.message_details where subject = $1 order by seq',
      [subject],
    )
    expect(rows.map(({ payload }) => payload)).toEqual(['1', '2', '3', '4', '6', '7'])
  })

  test('enqueues, in its own transactions too', async () => {
    const queue = unique('q')
    await using client = await stage.session('producer')
    const ids = [
      await producer.jobs.enqueue(queue, { payload: '1' }),
      await producer.jobs.enqueue(queue, { payload: '2', headers: { a: 'b' }, maxAttempts: 3, priority: 7, delayMs: 5 }),
      await producer.jobs.enqueue(queue, { payload: '3', runAt: new Date() }),
      ...(await producer.jobs.enqueueMany(queue, [{ payload: '4' }, { payload: '5', dedupKey: 'k' }])),
    ]
    expect(await producer.jobs.enqueue(queue, { payload: 'x', dedupKey: 'k' })).toBe(ids.at(-1))
    await client.query('begin')
    ids.push(await producer.jobs.enqueue(queue, { payload: '6' }, { tx: client }))
    const { rows } = await client.query(`select ${stage.schema}.enqueue($1, '7')::text as id`, [queue])
    ids.push((rows[0] as { id: string }).id)
    await client.query('commit')
    const found = await stage.rows<{ id: string; priority: number; max_attempts: number }>(
      'select id::text, priority, max_attempts from klieo.jobs where queue = $1 order by id',
      [queue],
    )
    expect(found.map(({ id }) => id)).toEqual(ids)
    expect(found.map((row) => [row.priority, row.max_attempts])).toEqual([[0, 5], [7, 3], ...Array(5).fill([0, 5])])
  })

  test('asks, and is answered', async () => {
    const subject = unique('r')
    await using _responder = await worker.requestReply.respond(subject, ({ payload }) => `${text(payload)}!`)
    expect(text(await producer.requestReply.request(subject, 'ask', { timeoutMs: 15_000 }))).toBe('ask!')
    await expect(producer.requestReply.request(unique('none'), 'x', { timeoutMs: 15_000 })).rejects.toMatchObject({ code: 'not_found' })
  })

  test('can do nothing else, and is told which right it lacks and how it is granted', async () => {
    for (const [right, call] of consuming(producer)) {
      expect((await denied('producer', 'worker', call())).message).toContain(right)
    }
    await denied('producer', 'reader', producer.kv.get('b', 'k'))
    await denied('producer', 'reader', drain(producer.kv.keys('b')))
    await denied('producer', 'admin', producer.pubsub.deleteDurable('d'))
    await using client = await stage.session('producer')
    for (const table of ['messages', 'jobs', 'replies', 'kv_entries', 'consumer_offsets', 'message_details', 'job_details']) {
      expect(await stateOf(client, `select from ${stage.schema}.${table}`)).toBe('42501')
      expect(await stateOf(client, `delete from ${stage.schema}.${table}`)).toBe('42501')
    }
    expect(await stateOf(client, `insert into ${stage.schema}.messages (subject, payload) values ('a', '')`)).toBe('42501')
    expect(await stateOf(client, `update ${stage.schema}.consumer_offsets set lo = '1:1:'`)).toBe('42501')
    expect(await stateOf(client, `select setval('${stage.schema}.message_seq', 1)`)).toBe('42501')
    expect(await stateOf(client, `create table ${stage.schema}.mine ()`)).toBe('42501')
    expect(await stateOf(client, `select ${stage.schema}.retry_dead('q')`)).toBe('42501')
    expect(await stateOf(client, `select ${stage.schema}.claim('q', 'me')`)).toBe('42501')
    expect(await stateOf(client, `select ${stage.schema}.subscribe('d', 'a')`)).toBe('42501')
  })

  test('in a transaction of somebody who has no rights it says so as well, and names no role that it does not know', async () => {
    await using client = await stage.session('nobody')
    await client.query('begin')
    await expect(producer.pubsub.publish('a', 'x', { tx: client })).rejects.toMatchObject({
      code: 'permission_denied',
      message: expect.stringContaining(`select ${stage.schema}.grant_role('producer', '<role>')`),
    })
  })

  test('the statement that the error recommends is the one that helps', async () => {
    const bus = await stage.connect('producer')
    try {
      const { message } = await denied('producer', 'worker', bus.jobs.claim('q', 'w', TTL_MS))
      const statement = message.slice(message.indexOf('select '))
      await stage.owner.query(statement)
      expect(await bus.jobs.claim(unique('q'), 'w', TTL_MS)).toBeNull()
    } finally {
      await bus.close()
      await stage.rows('select klieo.revoke_role($1)', [stage.login('producer')])
    }
  })
})

describe('a worker', () => {
  test('subscribes, settles in every way, and hands back when it closes', async () => {
    const [subject, durable] = [unique('s'), unique('d')]
    const bus = await stage.connect('worker')
    const stream = await bus.pubsub.subscribe(subject, durable, { ackWaitMs: TTL_MS, maxDeliver: 2 })
    const reading = stream[Symbol.asyncIterator]()
    const next = async () => (await reading.next()).value as Msg<PostgresTx>
    await producer.pubsub.publishMany(['acked', 'naked', 'ended', 'in a transaction'].map((payload) => ({ subject, payload })))
    const [acked, naked, ended, inTransaction] = [await next(), await next(), await next(), await next()]
    await acked.extend()
    await acked.ack()
    await ended.term('enough')
    await using client = await stage.session('worker')
    await client.query('begin')
    await inTransaction.ack({ tx: client })
    await client.query('commit')
    await expect(inTransaction.ack()).rejects.toMatchObject({ code: 'already_settled' })
    await naked.nak()
    const last = await next()
    expect([text(last.payload), last.attempt]).toEqual(['naked', 2])
    await last.nak()
    await producer.pubsub.publish(subject, 'held')
    expect(text((await next()).payload)).toBe('held')
    await bus.close()
    const letters = await stage.rows('select from klieo.messages where subject = $1', [`${durable}.dlq`])
    expect(letters).toHaveLength(1)
    const left = await stage.rows<{ redelivering: string }>('select redelivering from klieo.consumer_stats where durable = $1', [durable])
    expect(left).toEqual([{ redelivering: '1' }])
  })

  test('does all of it with nothing but SQL', async () => {
    const [queue, durable] = [unique('q'), unique('d')]
    await using client = await stage.session('worker')
    const call = async (text: string, values: readonly unknown[]) =>
      Object.values((await client.query(text.replaceAll('klieo.', `${stage.schema}.`), [...values])).rows[0] ?? {})[0]
    const claim = async () =>
      (await client.query(`select id, token from ${stage.schema}.claim($1, 'me')`, [queue])).rows.flatMap(({ id, token }) => [id, token])
    for (let n = 0; n < 2; n++) await call(`select klieo.enqueue($1, 'x')`, [queue])
    const first = await claim()
    expect(await call('select klieo.heartbeat($1, $2)', first)).toBeInstanceOf(Date)
    expect(await call('select klieo.release($1, $2)', first)).toBe(true)
    expect(await call('select klieo.nak($1, $2, 60000)', await claim())).toBe(true)
    const second = await claim()
    expect(await call('select klieo.dead_letter($1, $2, $3)', [...second, 'enough'])).toBe(true)
    expect(await call('select klieo.ack($1, $2)', second)).toBe(false)

    const fetch = async () =>
      (await client.query(`select seq, token from ${stage.schema}.fetch($1)`, [durable])).rows.flatMap(({ seq, token }) => [
        durable,
        seq,
        token,
      ])
    expect(await call(`select klieo.subscribe($1, $1 || '.>')`, [durable])).toBe(true)
    await call(`select klieo.publish($1 || '.a', 'x')`, [durable])
    expect(await call('select klieo.release_message($1, $2, $3)', await fetch())).toBe(true)
    expect(await call('select klieo.nak_message($1, $2, $3)', await fetch())).toBe(true)
    const delivery = await fetch()
    expect(await call('select klieo.extend_message($1, $2, $3)', delivery)).toBe(true)
    expect(await call('select klieo.ack_message($1, $2, $3)', delivery)).toBe(true)
    expect(await call('select klieo.term_message($1, $2, $3)', delivery)).toBe(false)
    expect(await call('select klieo.bury($1)', [durable])).toBe(0)
    expect(await call('select klieo.channel()', [])).toMatch(/^klieo_[0-9a-f]{16}$/)
    expect(await stateOf(client, `select ${stage.schema}.retry_dead('${queue}')`)).toBe('42501')
  })

  test('claims, extends and settles jobs in every way', async () => {
    const queue = unique('q')
    await worker.jobs.enqueueMany(
      queue,
      ['acked', 'naked', 'buried', 'in a transaction', 'held'].map((payload) => ({ payload, maxAttempts: 2 })),
    )
    const jobs = await worker.jobs.claimMany(queue, 'w', TTL_MS, { limit: 4 })
    type Claimed = ClaimedJob<PostgresTx>
    const [acked, naked, buried, inTransaction] = jobs as [Claimed, Claimed, Claimed, Claimed]
    await acked.heartbeat()
    await acked.ack()
    await naked.nak(0)
    await buried.deadLetter('enough')
    await using client = await stage.session('worker')
    await client.query('begin')
    await inTransaction.ack({ tx: client })
    await client.query('commit')
    await expect(inTransaction.ack()).rejects.toMatchObject({ code: 'already_settled' })
    const closing = await stage.connect('worker')
    expect(await closing.jobs.claimMany(queue, 'w', TTL_MS, { limit: 5 })).toHaveLength(2)
    await closing.close()
    const left = await stage.rows<{ state: string }>('select state from klieo.job_details where queue = $1 order by state', [queue])
    // One was in its last attempt.
    expect(left.map(({ state }) => state)).toEqual(['dead', 'dead', 'ready'])
  })

  test('uses keys, watches and leases', async () => {
    const bucket = unique('b')
    await using watch = await worker.kv.watch(bucket)
    const revision = await worker.kv.put(bucket, 'k', '1', { ttlMs: TTL_MS })
    expect(await first(watch)).toMatchObject({ operation: 'put', entry: { key: 'k', revision } })
    await worker.kv.cas(bucket, 'k', '2', revision)
    expect(text((await worker.kv.get(bucket, 'k'))?.value as Uint8Array)).toBe('2')
    expect(await drain(worker.kv.keys(bucket, '>'))).toEqual(['k'])
    await using client = await stage.session('worker')
    await client.query('begin')
    await worker.kv.delete(bucket, 'k', { tx: client })
    await client.query('commit')
    expect(await worker.kv.get(bucket, 'k')).toBeNull()
    const lease = await worker.kv.lease(bucket, 'k', TTL_MS)
    await lease.heartbeat()
    await expect(worker.kv.lease(bucket, 'k', TTL_MS, { waitMs: 50 })).rejects.toMatchObject({ code: 'lease_held' })
    await lease.release()
    await (await worker.kv.lease(bucket, 'k', TTL_MS, { waitMs: 50 })).release()
  })

  test('answers requests, behind a pooler too', async () => {
    const subject = unique('r')
    const responder = await worker.requestReply.respond(subject, () => {
      throw new Error('no')
    })
    await expect(worker.requestReply.request(subject, '', { timeoutMs: 15_000 })).rejects.toMatchObject({
      code: 'handler_failed',
      message: 'no',
    })
    await responder.close()
    await expect(worker.requestReply.request(subject, '', { timeoutMs: 15_000 })).rejects.toMatchObject({ code: 'not_found' })
    await using client = await stage.session('worker')
    await client.query(`select ${stage.schema}.register_responders(${stage.schema}.new_instance(), array['a'], 1000)`)
  })

  test('administers nothing: neither durables nor dead jobs, positions or the lease of maintenance', async () => {
    await denied('worker', 'admin', worker.pubsub.deleteDurable('d'))
    await using client = await stage.session('worker')
    const call = (text: string) => stateOf(client, `select ${stage.schema}.${text}`)
    expect(await call(`retry_dead('q')`)).toBe('42501')
    expect(await call('prune_messages(0, 100)')).toBe('42501')
    expect(await call('rebase()')).toBe('42501')
    expect(await call(`elect_maintainer(gen_random_uuid(), 'me', 1e9)`)).toBe('42501')
    expect(await call(`take_lease('$klieo', 'maintenance', gen_random_uuid(), 'me', 1e9)`)).toBe('22023')
    expect(await call(`kv_put('dedup.q', 'k', '1')`)).toBe('22023')
    expect(await stateOf(client, `update ${stage.schema}.consumer_offsets set lo = '1:1:'`)).toBe('42501')
    expect(await stateOf(client, `select from ${stage.schema}.jobs`)).toBe('42501')
  })
})

describe('a reader', () => {
  test('reads the views and keys', async () => {
    const [queue, bucket] = [unique('q'), unique('b')]
    await worker.jobs.enqueue(queue, { payload: 'payload' })
    await worker.kv.put(bucket, 'k', 'v')
    await using client = await stage.session('reader')
    const jobs = await client.query(`select payload_text from ${stage.schema}.job_details where queue = $1`, [queue])
    expect(jobs.rows).toEqual([{ payload_text: 'payload' }])
    const stats = await client.query(`select ready::int from ${stage.schema}.queue_stats where queue = $1`, [queue])
    expect(stats.rows).toEqual([{ ready: 1 }])
    await client.query(`select * from ${stage.schema}.consumer_stats, ${stage.schema}.message_details`)
    expect(text((await reader.kv.get(bucket, 'k'))?.value as Uint8Array)).toBe('v')
    expect(await drain(reader.kv.keys(bucket))).toEqual(['k'])
  })

  test('can do nothing else', async () => {
    for (const [right, call] of consuming(reader)) {
      expect((await denied('reader', 'worker', call())).message).toContain(right)
    }
    await denied('reader', 'producer', reader.pubsub.publish('a', 'x'))
    await denied('reader', 'producer', reader.jobs.enqueue('q', { payload: 'x' }))
    await denied('reader', 'producer', reader.jobs.enqueueMany('q', [{ payload: 'x' }]))
    await denied('reader', 'producer', reader.requestReply.request('a', 'x', { timeoutMs: 15_000 }))
    await denied('reader', 'admin', reader.pubsub.deleteDurable('d'))
  })
})

describe('an admin', () => {
  test('deletes durables, puts dead jobs back and looks', async () => {
    const [queue, durable] = [unique('q'), unique('d')]
    await (await worker.pubsub.subscribe('a', durable)).close()
    await worker.jobs.enqueue(queue, { payload: 'x' })
    await (await worker.jobs.claim(queue, 'w', TTL_MS))?.deadLetter('no')
    await using client = await stage.session('admin')
    const states = async () => (await client.query(`select state from ${stage.schema}.job_details where queue = $1`, [queue])).rows
    expect(await states()).toEqual([{ state: 'dead' }])
    await client.query(`select ${stage.schema}.retry_dead($1)`, [queue])
    expect(await states()).toEqual([{ state: 'ready' }])
    await admin.pubsub.deleteDurable(durable)
    await expect(admin.pubsub.deleteDurable(durable)).rejects.toMatchObject({ code: 'not_found' })
  })

  test('does not produce, consume or change the schema', async () => {
    for (const [right, call] of consuming(admin)) {
      expect((await denied('admin', 'worker', call())).message).toContain(right)
    }
    await denied('admin', 'producer', admin.pubsub.publish('a', 'x'))
    await using client = await stage.session('admin')
    expect(await stateOf(client, `drop table ${stage.schema}.jobs`)).toBe('42501')
    expect(
      await stateOf(client, `create or replace function ${stage.schema}.restored() returns boolean language sql as 'select true'`),
    ).toBe('42501')
    expect(await stateOf(client, `truncate ${stage.schema}.jobs`)).toBe('42501')
  })

  test('reaps and prunes, and a process of another role leaves it to him', async () => {
    const bucket = unique('b')
    await worker.kv.put(bucket, 'k', 'x', { ttlMs: 0 })
    const tombstones = () => stage.rows('select from klieo.kv_entries where bucket = $1 and value is null', [bucket])
    const elected = () => stage.rows(`select from klieo.kv_leases where bucket = '$klieo' and expires_at > now()`)
    const others = await Promise.all((['worker', 'producer', 'reader'] as const).map((kind) => stage.connect(kind, { maintenance: true })))
    await using _admin = await stage.connect('admin', { maintenance: true })
    await eventually(async () => (await tombstones()).length === 1, { timeoutMs: 20_000, what: 'the expired key made a tombstone' })
    expect(await elected()).toHaveLength(1)
    // Nor does their giving up end anything else of theirs.
    expect(await Promise.all(others.map((bus) => bus.close()))).toHaveLength(3)
  })
})

describe('nobody', () => {
  test('connects to nothing, and is told how he may', async () => {
    for (const migrate of [false, true]) await denied('nobody', 'worker', stage.connect('nobody', { migrate }))
    await using client = await stage.session('nobody')
    expect(await stateOf(client, `select ${stage.schema}.publish('a', '')`)).toBe('42501')
    expect(await stateOf(client, `select ${stage.schema}.as_text('')`)).toBe('42501')
    expect(await stateOf(client, `select from ${stage.schema}.meta`)).toBe('42501')
  })
})

describe('what takes the owner', () => {
  test('a role may connect with migrate where the schema is up to date; where it is not, it is told who can migrate', async () => {
    await (await stage.connect('producer', { migrate: true })).close()
    const [row] = await stage.rows<{ name: string }>('select max(name) as name from klieo.migrations')
    await stage.rows('delete from klieo.migrations where name = $1', [row?.name])
    try {
      await expect(stage.connect('worker', { migrate: true })).rejects.toMatchObject({
        code: 'permission_denied',
        message: expect.stringContaining('owner of the schema'),
      })
      await expect(stage.connect('worker')).rejects.toMatchObject({ code: 'schema_outdated' })
    } finally {
      await stage.rows(`insert into klieo.migrations (name, timestamp) values ($1, 'again')`, [row?.name])
    }
  })

  test('a restored database is repaired by an admin; a worker that meets it first is told so, and publishes nothing', async () => {
    const [{ seq } = { seq: 0 }] = await stage.rows<{ seq: string }>('select max(seq)::text as seq from klieo.messages')
    await stage.rows(`insert into klieo.kv_horizons (at, tx) values ('-infinity', '99999999999')`)
    try {
      for (const login of ['worker', 'producer', 'reader'] as const) {
        expect((await denied(login, 'admin', stage.connect(login))).message).toContain('rebase')
      }
      expect(await stage.rows('select max(seq)::text as seq from klieo.messages')).toEqual([{ seq }])
    } finally {
      await (await stage.connect('admin')).close()
    }
    await (await stage.connect('worker')).close()
  })
})

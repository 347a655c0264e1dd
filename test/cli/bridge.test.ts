/** klieo-bus bridge: what it shows, how it ends, which NATS it takes. */

import { cp, mkdir, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { durableOf } from '../../src/cli/commands/bridge.ts'
import { findNats } from '../../src/cli/nats.ts'
import { PostgresBus } from '../../src/index.ts'
import { NatsBus } from '../../src/nats/index.ts'
import { Gate } from '../faults/support/network/gate.ts'
import { NODE } from '../support/child.ts'
import { type NatsServer, natsServer, ownNatsServer, whyNoNats } from '../support/nats-server.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { eventually } from '../support/wait.ts'
import { build, complaint, directory, klieo, shell, start } from './command.ts'

const missing = whyNoNats()
const root = join(import.meta.dirname, '..', '..')
const schema = freshSchema()
const prefix = `c${schema.slice(-10)}`
const env: Record<string, string> = { DATABASE_URL: databaseUrl(), KLIEO_SCHEMA: schema }
/** With all that an address gives a meaning to. */
const SECRET = 'hunter2/@:%?#, and-more'
const SHOWN = /hunter2|and-more/
let names = 0
const fresh = (what: string) => `${what}${++names}`
const args = (subject: string, from: 'postgres' | 'nats', ...more: readonly string[]) => [
  ...['bridge', '--from', from, '--to', from === 'postgres' ? 'nats' : 'postgres', '--subject', subject],
  ...['--nats-prefix', prefix, '--ack-wait', '1s', ...more],
]

beforeAll(async () => {
  await build()
  await PostgresBus.migrate({ connectionString: databaseUrl(), schema })
}, 60_000)

describe.skipIf(missing !== undefined)(`bridge${missing === undefined ? '' : ` (${missing})`}`, () => {
  let server: Pick<NatsServer, 'url' | 'remove'>
  let postgres: PostgresBus
  let nats: NatsBus

  beforeAll(async () => {
    server = await natsServer()
    env.NATS_URL = `nats://${server.url}`
    postgres = await PostgresBus.connect({ connectionString: databaseUrl(), schema, maintenance: false })
    nats = await NatsBus.connect({ servers: server.url, prefix })
  })

  afterAll(async () => {
    await Promise.all([postgres?.close(), nats?.close()])
    await server?.remove()
  })

  test('B1 --idle ends it with exit code 0 and the count, in either direction', async () => {
    const [out, back] = [fresh('idle'), fresh('idle')]
    for (let n = 0; n < 3; n++) await Promise.all([postgres.pubsub.publish(`${out}.a`, 'x'), nats.pubsub.publish(`${back}.a`, 'x')])
    const ran = await klieo(args(`${out}.>`, 'postgres', '--idle', '500ms'), { env })
    expect(ran).toMatchObject({ code: 0, stdout: 'relayed 3 messages\n', stderr: '' })
    expect((await postgres.admin.durables()).find(({ durable }) => durable === `bridge-${out}-all`)).toMatchObject({
      pending: 0,
      inFlight: 0,
    })
    const json = await klieo(args(`${back}.*`, 'nats', '--durable', 'mine', '--idle', '500ms', '--json'), { env })
    expect(json).toMatchObject({ code: 0, stderr: '' })
    const counts = { relayed: 3, duplicates: 0, skipped: 0, refused: 0, held: 0 }
    expect(json.objects).toEqual([{ durable: 'mine', state: 'ended', ...counts, pending: 0, behindMs: 0 }])
  })

  test('shows its progress on standard error, and ends in order at Ctrl-C', async () => {
    const subject = fresh('lines')
    await postgres.pubsub.publish(subject, 'x')
    await using child = start(args(subject, 'postgres', '--every', '200ms'), { env })
    await eventually(() => /^1 relayed, \d+\/s, 0 pending, 0\.0 s behind$/m.test(child.stderr))
    child.interruptGroup()
    expect(await child.exited).toEqual({ code: 0, signal: null })
    expect(child.unread()).toEqual([{ text: 'relayed 1 message' }])
    expect(child.stderr.split('\n').filter((line) => line !== '' && !/ relayed, .* behind$/.test(line))).toEqual([])
  })

  test('with --json its progress is a line each on standard output', async () => {
    const subject = fresh('json')
    await nats.pubsub.publish(subject, 'x')
    await using child = start(args(subject, 'nats', '--every', '200ms', '--json'), { env })
    const line = await child.next(({ relayed }) => relayed === 1)
    expect(line).toMatchObject({ durable: `bridge-${subject}`, duplicates: 0, behindMs: expect.any(Number) })
    await child.next(({ state, pending }) => state === 'relaying' && pending === 0)
    child.interruptGroup('SIGTERM')
    expect(await child.exited).toEqual({ code: 0, signal: null })
    expect(child.unread().at(-1)).toMatchObject({ state: 'ended', relayed: 1, held: 0 })
    expect(child.stderr).toBe('')
  })

  test('B5 a message that is refused is told of, and counted', async () => {
    const subject = fresh('refused')
    const small = await ownNatsServer('max_payload: 256KB\n')
    try {
      await postgres.pubsub.publish(subject, new Uint8Array(256 * 1024))
      const ran = await klieo(args(subject, 'postgres', '--idle', '500ms', '--nats', small.url), { env })
      expect(ran).toMatchObject({ code: 0, stdout: 'relayed 0 messages (1 refused)\n' })
      expect(complaint(ran)).toMatch(/\[payload_too_large\]$/)
    } finally {
      await small.remove()
    }
  })

  test('B4 a second one says that it waits, and takes over', async () => {
    const subject = fresh('second')
    await using first = start(args(subject, 'postgres', '--every', '200ms', '--json'), { env })
    await first.next(({ state }) => state === 'relaying')
    await using second = start(args(subject, 'postgres', '--every', '200ms', '--json'), { env })
    await second.next(({ state }) => state === 'waiting')
    const note = `another bridge reads durable bridge-${subject}; this one takes over when that ends\n`
    await eventually(() => second.stderr === note)
    first.interruptGroup()
    expect(await first.exited).toEqual({ code: 0, signal: null })
    await second.next(({ state }) => state === 'relaying')
    second.interruptGroup()
    expect(await second.exited).toEqual({ code: 0, signal: null })
    expect([first.stderr, second.stderr]).toEqual(['', note])
  })

  test('B8 a server that is away is told of, and is no other bridge', async () => {
    const url = new URL(databaseUrl())
    await using gate = await Gate.start(url.hostname, Number(url.port || 5432))
    url.host = `127.0.0.1:${gate.port}`
    const subject = fresh('away')
    const options = { env: { ...env, DATABASE_URL: url.href } }
    await using child = start(args(subject, 'postgres', '--every', '200ms', '--json'), options)
    await child.next(({ state, pending }) => state === 'relaying' && pending === 0)
    gate.shut()
    await child.next(({ state, pending }) => state === 'waiting' && pending === null)
    await eventually(() => /^klieo-bus: .*\[connection\]$/m.test(child.stderr))
    gate.open()
    await child.next(({ state, pending }) => state === 'relaying' && pending === 0)
    child.interruptGroup()
    expect(await child.exited).toEqual({ code: 0, signal: null })
    expect(child.stderr).not.toContain('another bridge')
  })

  test('B8 a durable with another filter is exit code 4', async () => {
    const subject = fresh('filter')
    await (await postgres.pubsub.subscribe(`${subject}.a`, 'taken')).close()
    const ran = await klieo(args(`${subject}.b`, 'postgres', '--durable', 'taken'), { env })
    expect(ran).toMatchObject({ code: 4, stdout: '' })
    expect(complaint(ran)).toMatch(/"taken" exists with the filter .*\[conflict\]$/)
  })

  test('a server that cannot be reached is one sentence and exit code 1', async () => {
    const nobody = await klieo(args('a', 'postgres', '--nats', `nats://relay:${encodeURIComponent(SECRET)}@127.0.0.1:1`), { env })
    expect(nobody).toMatchObject({ code: 1, stdout: '' })
    expect(complaint(nobody)).toMatch(/\(--nats: 127\.0\.0\.1:1\) \[connection\]$/)
    expect(nobody.stderr).not.toMatch(SHOWN)
    const byDefault = await klieo(args('a', 'postgres'), { env: { ...env, NATS_URL: '127.0.0.1:1' } })
    expect(complaint(byDefault)).toMatch(/\(NATS_URL: 127\.0\.0\.1:1\) \[connection\]$/)
    const database = await klieo(args('a', 'nats', '--url', 'postgres://me:secret@127.0.0.1:1/db'), { env })
    expect(database).toMatchObject({ code: 1, stdout: '' })
    expect(complaint(database)).toMatch(/\(--url: me@127\.0\.0\.1:1\/db\) \[connection\]$/)
  })

  describe.each([
    ['a user and password', `authorization { user: relay, password: ${JSON.stringify(SECRET)} }\n`, (secret: string) => `relay:${secret}`],
    ['a token', `authorization { token: ${JSON.stringify(SECRET)} }\n`, (secret: string) => secret],
  ])('with %s', (_what, config, login) => {
    let guarded: NatsServer
    beforeAll(async () => {
      guarded = await ownNatsServer(config)
    })
    afterAll(() => guarded?.remove())
    const url = (secret: string) => `nats://${login(encodeURIComponent(secret))}@${guarded.url}`

    test('by NATS_URL and --nats, and the secret is shown nowhere', async () => {
      const subject = fresh('guarded')
      await postgres.pubsub.publish(subject, 'x')
      const byEnvironment = await klieo(args(subject, 'postgres', '--idle', '300ms'), { env: { ...env, NATS_URL: url(SECRET) } })
      expect(byEnvironment).toMatchObject({ code: 0, stdout: 'relayed 1 message\n', stderr: '' })
      const [byOption, second] = await Promise.all([
        klieo(args(subject, 'nats', '--nats', url(SECRET), '--idle', '300ms', '--json'), { env }),
        // The second of two addresses has it.
        klieo(args(subject, 'postgres', '--nats', `${guarded.url},${url(SECRET)}`, '--idle', '300ms'), { env }),
      ])
      expect(byOption).toMatchObject({ code: 0, stderr: '' })
      expect(byOption.objects).toMatchObject([{ skipped: 1, relayed: 0 }])
      expect(byOption.stdout).not.toMatch(SHOWN)
      expect(second).toMatchObject({ code: 0, stderr: '' })
    })

    test('a wrong one is refused, and shown nowhere', async () => {
      for (const ran of await Promise.all([
        klieo(args('a', 'postgres', '--nats', url(`not-${SECRET}`)), { env }),
        klieo(args('a', 'postgres'), { env: { ...env, NATS_URL: url(`not-${SECRET}`) } }),
        klieo(args('a', 'postgres', '--nats', guarded.url), { env }),
      ])) {
        expect(ran).toMatchObject({ code: 1, stdout: '' })
        expect(complaint(ran)).toMatch(/\((--nats|NATS_URL): 127\.0\.0\.1:\d+\) \[permission_denied\]$/)
        expect(ran.stderr).not.toMatch(SHOWN)
      }
    })
  })

  test('--nats-creds that cannot be read, or holds none', async () => {
    const absent = await klieo(args('a', 'postgres', '--nats-creds', '/no/such/file.creds'), { env })
    expect(absent).toMatchObject({ code: 2, stdout: '' })
    expect(complaint(absent)).toMatch(/^--nats-creds cannot be read: ENOENT.*file\.creds/)
    await using place = await directory()
    const file = join(place.path, 'my.creds')
    await writeFile(file, SECRET)
    const garbage = await klieo(args('a', 'postgres', '--nats-creds', file), { env })
    expect(garbage).toMatchObject({ code: 2, stdout: '' })
    expect(complaint(garbage)).toMatch(/credentials.*\[invalid_argument\]$/)
    expect(garbage.stderr).not.toMatch(SHOWN)
  })
})

test('what is no backend, both the same, or missing is wrong usage', async () => {
  const wrong: readonly (readonly [readonly string[], RegExp])[] = [
    [['--from', 'kafka', '--to', 'nats', '--subject', 'a'], /--from .*postgres.*nats/],
    [['--from', 'postgres', '--to', 'memory', '--subject', 'a'], /--to .*postgres.*nats/],
    [['--from', 'nats', '--to', 'nats', '--subject', 'a'], /--from and --to are two different ones/],
    [['--from', 'postgres', '--to', 'nats'], /--subject/],
    [['--to', 'nats', '--subject', 'a'], /--from/],
    [['--from', 'postgres', '--to', 'nats', '--subject', 'a', '--ack-wait', '1x'], /--ack-wait/],
    [['--from', 'postgres', '--to', 'nats', '--subject', 'a', '--in-flight', '0'], /--in-flight/],
    [['--from', 'postgres', '--to', 'nats', '--subject', 'a', '--start', 'yesterday-ish'], /--start/],
  ]
  for (const [given, said] of wrong) {
    const ran = await klieo(['bridge', ...given], { env })
    expect(ran, given.join(' ')).toMatchObject({ code: 2, stdout: '' })
    expect(complaint(ran)).toMatch(said)
  }
})

test('an address of NATS that is none is wrong usage, and shown in no part', async () => {
  const addresses = [
    'http://relay:hunter2@host',
    'nats://',
    'nats://relay:hunter2/and-more@host',
    'nats://hunter2:12#and-more@host',
    'nats://hunter2:12?and-more@host',
    'nats://hunter2:12/and-more@host',
    'nats://relay:hunter2%zz@host',
    'nats://host,ftp://hunter2@host',
    // Passwords with a comma.
    'nats://hunter2,and-more@host',
    'nats://relay:12,and-more@host',
    'relay:and-more@hunter2,x@host',
  ]
  for (const address of addresses) {
    for (const given of [address, undefined]) {
      const options = { nats: given, 'nats-prefix': 'klieo', 'nats-creds': undefined }
      const failure = await findNats(options, { NATS_URL: address }).then(
        () => undefined,
        (error: Error) => error,
      )
      expect(failure, address).toMatchObject({ exitCode: 2 })
      expect(failure?.message).toMatch(given === undefined ? /^NATS_URL is not an address/ : /^--nats is not an address/)
      expect(failure?.message).not.toMatch(SHOWN)
    }
  }
})

test('an address of NATS: several, with and without a scheme, port, user, TLS', async () => {
  const found = (nats: string) => findNats({ nats, 'nats-prefix': 'p', 'nats-creds': undefined }, {})
  const common = { prefix: 'p', maxPayloadBytes: 'server' }
  expect(await found('one')).toEqual({ options: { ...common, servers: ['one:4222'] }, what: '--nats: one:4222' })
  expect((await found('nats://me:pa%40ss@one:1, two:2')).options).toEqual({
    ...common,
    servers: ['one:1', 'two:2'],
    user: 'me',
    pass: 'pa@ss',
  })
  expect((await found('tls://token@[::1]/')).options).toEqual({ ...common, servers: ['[::1]:4222'], token: 'token', tls: {} })
  const nothing = await findNats({ nats: undefined, 'nats-prefix': 'p', 'nats-creds': undefined }, { NATS_URL: '' })
  expect(nothing).toEqual({ options: common, what: 'no --nats and no NATS_URL, so 127.0.0.1:4222' })
})

test('the durable is named after the filter', () => {
  expect(['orders.>', 'a.*.b', '>', 'x.'.repeat(200)].map((filter) => durableOf(filter).slice(0, 20))).toEqual([
    'bridge-orders-all',
    'bridge-a-any-b',
    'bridge-all',
    'bridge-x-x-x-x-x-x-x',
  ])
  expect(durableOf('x.'.repeat(200))).toHaveLength(128)
})

test('without the clients of NATS it says what to install', async () => {
  await using place = await directory()
  await cp(join(root, 'dist'), join(place.path, 'dist'), { recursive: true })
  await cp(join(root, 'package.json'), join(place.path, 'package.json'))
  await cp(join(root, 'sql', 'migrations'), join(place.path, 'sql', 'migrations'), { recursive: true })
  await mkdir(join(place.path, 'node_modules'))
  for (const name of ['pg', 'kysely', 'pg-listen']) await symlink(join(root, 'node_modules', name), join(place.path, 'node_modules', name))
  const line = `"${NODE}" "${join(place.path, 'dist', 'cli', 'main.js')}" bridge --from postgres --to nats --subject a`
  const ran = await shell(line, { env, cwd: place.path })
  expect(ran).toMatchObject({ code: 1, stdout: '' })
  expect(complaint(ran)).toMatch(/^the clients of NATS are not installed: npm install .*@nats-io\/kv \[unsupported\]$/)
})

/** What a bus does to the process it lives in: it never ends it, never keeps it alive, and tells what failed without telling secrets. */

import { inspect } from 'node:util'
import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { BusError, PostgresBus } from '../../src/index.ts'
import { Database } from '../../src/postgres/database.ts'
import { Sockets } from '../../src/postgres/sockets.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/index.ts'
import { type Child, startChild } from '../support/child.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { outcome } from './support/outcome.ts'
import { Relay } from './support/relay.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
/** Node's own start is not in it: from `close` to the end of the process. */
const EXIT_MS = 5_000
const CHILD = new URL('./support/open-bus-child.ts', import.meta.url)
/** The key of the lock under which migrations queue up. */
const MIGRATION_LOCK = '5203947117801442'

let observer: Session

beforeAll(async () => {
  observer = await session(connectionString)
  await (await PostgresBus.connect({ connectionString, schema, maintenance: false })).close()
})

afterAll(async () => {
  await observer.query(`drop schema ${schema} cascade`)
  await observer[Symbol.asyncDispose]()
})

function changed(url: string, change: (url: URL) => void): string {
  const changed_ = new URL(url)
  change(changed_)
  return changed_.href
}

const named = (url: string, name: string) => changed(url, (to) => to.searchParams.set('application_name', name))

async function endOf(child: Child): Promise<{ code: number | null; late: boolean }> {
  const tooLate = Promise.withResolvers<null>()
  const timer = setTimeout(() => tooLate.resolve(null), EXIT_MS)
  const exit = await Promise.race([child.exited, tooLate.promise])
  clearTimeout(timer)
  return exit ? { code: exit.code, late: false } : { code: null, late: true }
}

interface Closed {
  readonly closedInMs: number
  readonly ended: Record<string, string>
  readonly aborted: boolean
}

const ALL_ENDED = { stream: 'ok', watch: 'ok', claim: 'closed', lease: 'closed', request: 'closed' }

describe('the end', () => {
  test('after close every wait has ended, and nothing keeps the process alive', async () => {
    await using child = startChild(CHILD, { args: [connectionString, schema] })
    await child.next(({ ready }) => ready === true)
    child.send('close')
    const { closedInMs, ended, aborted } = (await child.next(({ closedInMs: ms }) => ms !== undefined)) as unknown as Closed
    expect(ended).toEqual(ALL_ENDED)
    expect(aborted).toBe(true)
    expect(closedInMs).toBeLessThan(2_000)
    expect(await endOf(child)).toEqual({ code: 0, late: false })
    expect(child.stderr).toBe('')
  })

  test('so it is when the server does not answer any more', async () => {
    await using relay = await Relay.start(connectionString)
    await using child = startChild(CHILD, { args: [relay.connectionString, freshSchemaOf()] })
    await child.next(({ ready }) => ready === true)
    relay.freeze()
    child.send('close')
    const { ended } = (await child.next(({ closedInMs: ms }) => ms !== undefined)) as unknown as Closed
    expect(ended).toEqual(ALL_ENDED)
    expect(await endOf(child)).toEqual({ code: 0, late: false })
    relay.thaw()
  })

  test('so it is for a bus that has nothing under way and says goodbye to a server that does not answer', async () => {
    await using relay = await Relay.start(connectionString)
    await using child = startChild(new URL('./support/connect-child.ts', import.meta.url), {
      args: [relay.connectionString, schema, 'wait'],
    })
    expect(await child.next(({ connected }) => connected !== undefined)).toEqual({ connected: 'ok' })
    relay.freeze()
    child.send('close')
    expect(await endOf(child)).toEqual({ code: 0, late: false })
    relay.thaw()
  })

  test('so it is when the server is gone', async () => {
    await using relay = await Relay.start(connectionString)
    await using child = startChild(CHILD, { args: [relay.connectionString, freshSchemaOf()] })
    await child.next(({ ready }) => ready === true)
    relay.refuse(true)
    relay.cut()
    await eventually(() => relay.refused > 0)
    child.send('close')
    const { ended } = (await child.next(({ closedInMs: ms }) => ms !== undefined)) as unknown as Closed
    expect(ended).toMatchObject({ stream: 'ok', watch: 'ok' })
    expect(await endOf(child)).toEqual({ code: 0, late: false })
  })

  test('so it is when its connections are lost, and new ones are taken and never answered', async () => {
    await using relay = await Relay.start(connectionString)
    await using child = startChild(CHILD, { args: [relay.connectionString, freshSchemaOf()] })
    await child.next(({ ready }) => ready === true)
    relay.cut()
    relay.freeze()
    await eventually(() => relay.taken >= 3)
    child.send('close')
    const { ended } = (await child.next(({ closedInMs: ms }) => ms !== undefined)) as unknown as Closed
    expect(ended).toMatchObject({ stream: 'ok', watch: 'ok' })
    expect(await endOf(child)).toEqual({ code: 0, late: false })
    relay.thaw()
  })

  test('a connect that fails leaves nothing that keeps the process alive', async () => {
    await using child = startChild(new URL('./support/connect-child.ts', import.meta.url), {
      args: [changed(connectionString, (url) => (url.pathname = '/no_such_database')), schema],
    })
    expect(await child.next(({ connected }) => connected !== undefined)).toEqual({ connected: 'not_found' })
    expect(await endOf(child)).toEqual({ code: 0, late: false })
    expect(child.stderr).toBe('')
  })

  test('a pool of the app’s own is left as it was: usable, and with no listener of ours', async () => {
    const pool = new pg.Pool({ connectionString })
    const listeners = () => pool.eventNames().map((name) => [name, pool.listenerCount(name)])
    const before = listeners()
    const bus = await PostgresBus.connect({ pool, schema, maintenance: false })
    await bus.kv.put('pool', 'k', 'v')
    await bus.close()
    expect(listeners()).toEqual(before)
    expect((await pool.query('select 1 as one')).rows).toEqual([{ one: 1 }])
    await pool.end()
  })

  test('a pool of one connection is enough', async () => {
    const pool = new pg.Pool({ connectionString, max: 1 })
    const bus = await PostgresBus.connect({ pool, schema: freshSchemaOf() })
    await using _responder = await bus.requestReply.respond('one', ({ payload }) => payload)
    await Promise.all([
      bus.kv.put('one', 'k', 'v'),
      bus.pubsub.publish('one', 'm'),
      bus.requestReply.request('one', 'r', { timeoutMs: 10_000 }),
    ])
    await bus.close()
    await pool.end()
  })
})

/** One that the observer need not drop: the run does. */
function freshSchemaOf(): string {
  return freshSchema()
}

describe('connections that die', () => {
  // Half a minute is what it takes: a shorter patience would cut off statements that wait for somebody's transaction.
  test('connections that went silent are given up within 45 s: a call fails, a stream goes on', async () => {
    await using relay = await Relay.start(connectionString)
    await using bus = await PostgresBus.connect({
      connectionString: relay.connectionString,
      schema,
      maintenance: false,
      pollIntervalMs: 100,
    })
    await using direct = await PostgresBus.connect({ connectionString, schema, maintenance: false })
    const stream = await bus.pubsub.subscribe('silent', `silent-${crypto.randomUUID()}`)
    const next = stream[Symbol.asyncIterator]().next()
    expect(await outcome(bus.kv.get('silent', 'k'))).toBe('ok')
    relay.silence()
    const startedAt = performance.now()
    const call = outcome(bus.kv.get('silent', 'k'))
    await direct.pubsub.publish('silent', 'heard')
    const message = (await next).value
    expect(Buffer.from(message?.payload ?? []).toString()).toBe('heard')
    expect(['ok', 'connection']).toContain(await call)
    expect(performance.now() - startedAt).toBeLessThan(45_000)
    await message?.ack()
  }, 60_000)

  test('all of a process, again and again, while it works: typed errors, and it goes on', async () => {
    const name = 'process-test dying'
    await using child = startChild(CHILD, { args: [named(connectionString, name), schema] })
    await child.next(({ ready }) => ready === true)
    child.send('work')
    let worked: unknown
    const result = child.next(({ worked: done }) => done !== undefined, 25_000).then((line) => (worked = line.worked))
    for (let round = 0; round < 15 && worked === undefined; round++) {
      await observer.query('select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1', [name])
      await observer.query('select pg_sleep(0.03)')
    }
    const codes = Object.keys((await result) as Record<string, number>)
    expect(codes).toContain('ok')
    for (const code of codes) expect(['ok', 'connection']).toContain(code)
    child.send('work')
    expect(await child.next(({ worked: done }) => done !== undefined)).toEqual({ worked: { ok: 400 } })
    child.send('close')
    expect(((await child.next(({ closedInMs: ms }) => ms !== undefined)) as unknown as Closed).ended).toMatchObject({
      stream: 'ok',
      watch: 'ok',
    })
    expect(await endOf(child)).toEqual({ code: 0, late: false })
  })

  test('reset or ended by the network, again and again, while they are made, idle and at work: typed errors, and it goes on', async () => {
    await using relay = await Relay.start(connectionString)
    await using child = startChild(CHILD, { args: [relay.connectionString, schema] })
    await child.next(({ ready }) => ready === true)
    child.send('work')
    let worked: unknown
    const result = child.next(({ worked: done }) => done !== undefined, 25_000).then((line) => (worked = line.worked))
    for (let round = 0; round < 20 && worked === undefined; round++) {
      if (round % 3 === 2) relay.cut()
      else relay.reset()
      await observer.query('select pg_sleep(0.03)')
    }
    for (const code of Object.keys((await result) as Record<string, number>)) expect(['ok', 'connection']).toContain(code)
    child.send('work')
    expect(await child.next(({ worked: done }) => done !== undefined)).toEqual({ worked: { ok: 400 } })
    relay.reset()
    child.send('close')
    await child.next(({ closedInMs: ms }) => ms !== undefined)
    expect(await endOf(child)).toEqual({ code: 0, late: false })
  })

  test('one that is terminated before it has heard that it is ready is no event of the process', async () => {
    const name = 'process-test unheard'
    await using relay = await Relay.start(connectionString)
    const backend = async () => {
      const { rows } = await observer.query('select pid from pg_stat_activity where application_name = $1', [name])
      return (rows[0] as { pid: number } | undefined)?.pid ?? 0
    }
    const uncaught: unknown[] = []
    const note = (error: unknown) => void uncaught.push(error)
    const others = process.listeners('uncaughtException')
    process.removeAllListeners('uncaughtException')
    process.on('uncaughtException', note)
    let terminated = 0
    try {
      // How often a client speaks before the server is ready depends on how it is asked for its password.
      for (let times = 1; times <= 4 && terminated === 0; times++) {
        const sockets = new Sockets()
        const pool = new pg.Pool({ connectionString: named(relay.connectionString, name), stream: sockets.stream })
        const db = new Database(pool, true, schema, sockets)
        relay.holdNewAfter(times)
        const used = db
          .withClient((client) => client.query('select 1'), 'test')
          .then(
            () => 'ok',
            () => 'failed',
          )
        const pid = await eventually(backend, { timeoutMs: 1_000, everyMs: 10 }).catch(() => 0)
        if (pid > 0) {
          await observer.query('select pg_terminate_backend($1)', [pid])
          await eventually(async () => (await backend()) === 0)
          terminated = pid
        }
        relay.thaw()
        expect(await used).toBe(pid > 0 ? 'failed' : 'ok')
        await db.close()
      }
    } finally {
      process.off('uncaughtException', note)
      for (const listener of others) process.on('uncaughtException', listener)
    }
    expect(terminated).toBeGreaterThan(0)
    expect(uncaught).toEqual([])
  })

  test('one in the middle of a migration: connect is rejected, and the process lives', async () => {
    const name = 'process-test migrating'
    await using holder = await session(connectionString)
    await holder.query('select pg_advisory_lock($1)', [MIGRATION_LOCK])
    await using child = startChild(new URL('./support/connect-child.ts', import.meta.url), {
      args: [named(connectionString, name), freshSchemaOf()],
    })
    const pid = await eventually(
      async () => {
        const { rows } = await observer.query(`select pid from pg_stat_activity where application_name = $1 and wait_event = 'advisory'`, [
          name,
        ])
        return (rows[0] as { pid: number } | undefined)?.pid ?? 0
      },
      { what: 'a migration that waits' },
    )
    await observer.query('select pg_terminate_backend($1)', [pid])
    expect(await child.next(({ connected }) => connected !== undefined)).toEqual({ connected: 'connection' })
    expect(await endOf(child)).toEqual({ code: 0, late: false })
  })
})

describe('maintenance', () => {
  test('of three processes one does it, and when it closes another does', async () => {
    const own = freshSchemaOf()
    const holder = async () => {
      const { rows } = await observer.query(
        `select holder from ${own}.kv_leases where bucket = '$klieo' and key = 'maintenance' and expires_at > clock_timestamp()`,
      )
      return (rows[0] as { holder: string } | undefined)?.holder ?? ''
    }
    const first = await PostgresBus.connect({ connectionString, schema: own })
    const elected = await eventually(holder)
    const rest = await Promise.all([1, 2].map(() => PostgresBus.connect({ connectionString, schema: own })))
    expect(await holder()).toBe(elected)
    await first.close()
    // Sooner than its lease would have run out.
    await eventually(async () => ![elected, ''].includes(await holder()), { timeoutMs: 9_000, everyMs: 50 })
    await Promise.all(rest.map((bus) => bus.close()))
  })
})

async function failureOf(call: Promise<unknown>): Promise<BusError> {
  const failure = await call.then(
    () => undefined,
    (error: unknown) => error,
  )
  expect(failure).toBeInstanceOf(BusError)
  return failure as BusError
}

const connectTo = (url: string) => PostgresBus.connect({ connectionString: url, schema, maintenance: false }).then((bus) => bus.close())

describe('what failed', () => {
  test('nothing was sent: connection, and retryable', async () => {
    const closedPort = changed(connectionString, (url) => (url.port = '1'))
    const nowhere = changed(connectionString, (url) => (url.hostname = 'nowhere.invalid'))
    for (const url of [closedPort, nowhere]) expect(await failureOf(connectTo(url))).toMatchObject({ code: 'connection', retryable: true })
  })

  test('a role with too many connections, without rights or login: unavailable and retryable, permission_denied and not', async () => {
    const role = `r_${schema}`
    await observer.query(`create role ${role} login password 'p' connection limit 0`)
    try {
      const url = changed(connectionString, (to) => {
        to.username = role
        to.password = 'p'
      })
      expect(await failureOf(connectTo(url))).toMatchObject({ code: 'unavailable', retryable: true })
      await observer.query(`alter role ${role} connection limit -1`)
      expect(await failureOf(connectTo(url))).toMatchObject({ code: 'permission_denied', retryable: false })
      await observer.query(`alter role ${role} nologin`)
      expect(await failureOf(connectTo(url))).toMatchObject({ code: 'permission_denied', retryable: false })
    } finally {
      await observer.query(`drop role ${role}`)
    }
  })

  test('a role that may have two connections, one for the pool and one for LISTEN, has enough', async () => {
    const role = `two_${schema}`
    await observer.query(`create role ${role} login password 'p' connection limit 2`)
    await observer.query(`grant usage on schema ${schema} to ${role}`)
    for (const what of ['tables', 'sequences', 'functions']) await observer.query(`grant all on all ${what} in schema ${schema} to ${role}`)
    const url = changed(connectionString, (to) => {
      to.username = role
      to.password = 'p'
    })
    const pool = new pg.Pool({ connectionString: url, max: 1 })
    pool.on('error', () => {})
    const bus = await PostgresBus.connect({ pool, schema, maintenance: false })
    try {
      expect(await outcome(bus.kv.put('limit', 'k', 'v'))).toBe('ok')
      await observer.query(`select pg_terminate_backend(pid) from pg_stat_activity where usename = $1`, [role])
      await eventually(async () => expect(await outcome(bus.kv.put('limit', 'k', 'v'))).toBe('ok'), { timeoutMs: 5_000 })
    } finally {
      await bus.close()
      await pool.end()
      await observer.query(`drop owned by ${role}; drop role ${role}`)
    }
  })

  test('a statement that is cancelled is a timeout, one that waits for a lock too long a retryable one; nothing was written', async () => {
    await using holder = await session(connectionString)
    await holder.query(`begin; lock table ${schema}.kv_entries in access exclusive mode`)
    for (const [setting, retryable] of [
      ['statement_timeout', false],
      ['lock_timeout', true],
    ] as const) {
      const url = changed(connectionString, (to) => to.searchParams.set('options', `-c ${setting}=1500`))
      const pool = new pg.Pool({ connectionString: url })
      const bus = await PostgresBus.connect({ pool, schema, maintenance: false })
      expect(await failureOf(bus.kv.put('cancelled', 'k', 'v'))).toMatchObject({ code: 'timeout', retryable })
      await bus.close()
      await pool.end()
    }
    await holder.query('commit')
    const { rowCount } = await observer.query(`select from ${schema}.kv_entries where bucket = 'cancelled'`)
    expect(rowCount).toBe(0)
  })

  test('section 7 in the caller’s transaction: a deadlock or a serialization failure is a retryable conflict, what follows is one that is not', async () => {
    const bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
    await using one = await session(connectionString)
    await bus.kv.put('conflicts', 'k', '0')
    await one.query('begin isolation level repeatable read')
    await one.query('select 1')
    await bus.kv.put('conflicts', 'k', '1')
    expect(await failureOf(bus.kv.put('conflicts', 'k', '2', { tx: one }))).toMatchObject({ code: 'conflict', retryable: true })
    expect(await failureOf(bus.kv.put('conflicts', 'k', '3', { tx: one }))).toMatchObject({ code: 'conflict', retryable: false })
    await one.query('rollback')
    await bus.close()
  })

  test('no secret of a connection string is in an error, its cause or their properties', async () => {
    const secret = 's3cr3t-w0rd'
    const url = new URL(connectionString)
    const at = `${url.hostname}:${url.port}`
    const strings = [
      `postgres://user:${secret}@127.0.0.1:1/db`,
      `postgres://user:${secret}@nowhere.invalid/db`,
      `postgres://user:${secret}@127.0.0.1:port/db`,
      `postgres://user:${secret}@127.0.0.1:99999/db`,
      `postgres://user:${secret}@@:/db`,
      `postgres://user:${secret}@[::1/db`,
      `postgres://user:${secret}%zz@127.0.0.1:1/db`,
      `postgres://user:${secret} x@127.0.0.1:1/db`,
      `postgres://nobody_${schema}:${secret}@${at}/postgres`,
      `postgres://nobody_${schema}:${secret}@${at}/postgres?sslmode=require`,
      `postgres://nobody_${schema}@${at}/postgres?password=${secret}&sslrootcert=/no/such/file`,
      `user=nobody password=${secret} host=127.0.0.1`,
    ]
    for (const string of strings) {
      const failure = await failureOf(connectTo(string))
      expect.soft(inspect(failure, { depth: 12, showHidden: true, getters: true }), string).not.toContain(secret)
    }
    const listen = { connectionString, schema, maintenance: false, listenConnectionString: strings[0]! }
    const bus = await PostgresBus.connect(listen)
    expect(inspect(bus, { depth: 12, showHidden: true })).not.toContain(secret)
    const respond = await outcome(bus.requestReply.respond('secret', () => ''))
    expect(['ok', 'connection']).toContain(respond)
    await bus.close()
  })
})

describe('connection strings', () => {
  test('a connection string that is none is an invalid argument', async () => {
    for (const string of [
      'postgres://u:p@127.0.0.1:port/db',
      'postgres://u:p@127.0.0.1:99999/db',
      'postgres://u:p@@:/db',
      'postgres://u:p@[::1/db',
    ]) {
      expect.soft(await outcome(connectTo(string)), string).toBe('invalid_argument')
      const listen = PostgresBus.connect({ connectionString, schema, maintenance: false, listenConnectionString: string })
      expect.soft(await outcome(listen.then((bus) => bus.close())), string).toBe('invalid_argument')
    }
  })
})

describe('a server of its own', () => {
  let server: EmbeddedPostgres

  beforeAll(async () => {
    server = await startEmbeddedPostgres()
  })

  afterAll(() => server.stop('immediate'))

  test('a server that is going away or coming up takes nobody: connection, and retryable, since nothing was sent', async () => {
    const bus = await PostgresBus.connect({ connectionString: server.connectionString, maintenance: false })
    await using stays = await session(server.connectionString)
    // A smart shutdown waits for the sessions and takes no new ones.
    process.kill(server.pid, 'SIGTERM')
    await eventually(
      async () => {
        const failure = await failureOf(
          PostgresBus.connect({ connectionString: server.connectionString, maintenance: false }).then((late) => late.close()),
        )
        expect(failure.cause).toMatchObject({ code: '57P03' })
        expect(failure).toMatchObject({ code: 'connection', retryable: true })
      },
      { timeoutMs: 3_000 },
    )
    await stays.end()
    await bus.close()
    await server.restart()
  })

  test('a server without SSL refuses who asks for it: connection, since nothing was sent', async () => {
    const url = changed(server.connectionString, (to) => to.searchParams.set('sslmode', 'require'))
    expect(await failureOf(connectTo(url))).toMatchObject({ code: 'connection' })
  })
})

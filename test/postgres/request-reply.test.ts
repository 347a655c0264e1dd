/** Requests between processes and through what breaks between them: who counts as live, and what reaches whom. */

import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { type BusError, PostgresBus } from '../../src/index.ts'
import { configOf, Database } from '../../src/postgres/database.ts'
import { Presence } from '../../src/postgres/presence.ts'
import { Sockets } from '../../src/postgres/sockets.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/index.ts'
import { startChild } from '../support/child.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { deferred, eventually } from '../support/wait.ts'
import { outcome, text } from './support/outcome.ts'
import { Relay } from './support/relay.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
/** Longer than any test waits: what comes, came by a notification or a registration, not by time. */
const NEVER_MS = 60_000

let bus: PostgresBus
let other: PostgresBus
let observer: Session
let subjects = 0

const options = { connectionString, schema, maintenance: false }

beforeAll(async () => {
  bus = await PostgresBus.connect(options)
  other = await PostgresBus.connect(options)
  observer = await session(connectionString)
})

afterAll(async () => {
  await Promise.all([bus.close(), other.close()])
  await observer.query(`drop schema ${schema} cascade`)
  await observer[Symbol.asyncDispose]()
})

const freshSubject = () => `subject.s${++subjects}`
const ask = (by: PostgresBus, subject: string, timeoutMs = 5_000) => by.requestReply.request(subject, subject, { timeoutMs })

function startResponder(subject: string) {
  return startChild(new URL('./support/responder-child.ts', import.meta.url), { args: [connectionString, schema, subject] })
}

function named(url: string, name: string): string {
  const named_ = new URL(url)
  named_.searchParams.set('application_name', name)
  return named_.href
}

describe('who is live', () => {
  test('R2 R4 a responder killed with kill -9 is not found within a second, one that goes on is found all the while', async () => {
    const [gone, stays] = [freshSubject(), freshSubject()]
    await using killed = startResponder(gone)
    await using alive = startResponder(stays)
    await Promise.all([killed.next(({ ready }) => ready === true), alive.next(({ ready }) => ready === true)])
    expect(text(await ask(bus, gone))).toBe(gone)
    await killed.kill('SIGKILL')
    const killedAt = performance.now()
    await eventually(async () => expect(await outcome(ask(bus, gone, 300))).toBe('not_found'), { timeoutMs: 1_000, everyMs: 10 })
    expect(performance.now() - killedAt).toBeLessThan(1_000)
    expect(text(await ask(bus, stays))).toBe(stays)
  })

  test('R4 killed in the middle of a handler: that request times out and is never handled again, the next one is not_found', async () => {
    const subject = freshSubject()
    await using child = startResponder(subject)
    await child.next(({ ready }) => ready === true)
    const request = outcome(bus.requestReply.request(subject, 'hang', { timeoutMs: 1_500 }))
    await child.next(({ handling }) => handling === 'hang')
    await child.kill('SIGKILL')
    await eventually(async () => expect(await outcome(ask(bus, subject, 300))).toBe('not_found'), { timeoutMs: 1_000, everyMs: 10 })
    let handled = 0
    await using _responder = await other.requestReply.respond(subject, () => {
      handled++
      return ''
    })
    expect(await request).toBe('timeout')
    expect(handled).toBe(0)
  })

  test('R2 a responder whose process is stopped: timeout; when it goes on it does not start what is over', async () => {
    const subject = freshSubject()
    await using child = startResponder(subject)
    await child.next(({ ready }) => ready === true)
    child.pause()
    expect(await outcome(ask(bus, subject, 300))).toBe('timeout')
    child.resume()
    expect(text(await bus.requestReply.request(subject, 'next', { timeoutMs: 5_000 }))).toBe('next')
    expect(child.unread().filter(({ handling }) => handling !== undefined)).toEqual([{ handling: 'next' }])
  })

  test('R2 two that register at once: each is found as soon as its respond has resolved', async () => {
    const [first, second] = [freshSubject(), freshSubject()]
    await using fresh = await PostgresBus.connect(options)
    const one = fresh.requestReply.respond(first, () => 'first')
    await fresh.requestReply.respond(second, () => 'second')
    const found = await outcome(ask(bus, second))
    await one
    expect([found, await outcome(ask(bus, first))]).toEqual(['ok', 'ok'])
  })

  test('R2 when the presence connection cannot be made, every respond that is under way says so, or is found later', async () => {
    const [first, second] = [freshSubject(), freshSubject()]
    await using relay = await Relay.start(connectionString)
    await using fresh = await PostgresBus.connect({ ...options, listenConnectionString: relay.connectionString })
    relay.refuse(true)
    const results = await Promise.allSettled([
      fresh.requestReply.respond(first, () => 'first'),
      fresh.requestReply.respond(second, () => 'second'),
    ])
    relay.refuse(false)
    const registered = [first, second].filter((_, n) => results[n]?.status === 'fulfilled')
    for (const result of results) if (result.status === 'rejected') expect(result.reason.code).toBe('connection')
    for (const subject of registered) {
      await eventually(async () => expect(await outcome(ask(bus, subject, 1_000))).toBe('ok'), { timeoutMs: 5_000 })
    }
  })

  test('close: a respond that waits to count as live rejects with closed', async () => {
    await using caller = await session(connectionString)
    const fresh = await PostgresBus.connect(options)
    const { rows } = await caller.query(`select ${schema}.new_instance() as id`)
    const next = (rows[0] as { id: number }).id + 1
    // As if somebody were just looking whether it lives, for long.
    await caller.query(`select pg_advisory_lock_shared(${schema}.presence_class(), $1)`, [next])
    const responding = outcome(fresh.requestReply.respond(freshSubject(), () => 'never'))
    await eventually(
      async () => {
        const waiting = await observer.query(`select 1 from pg_locks where locktype = 'advisory' and objid = $1 and not granted`, [next])
        expect(waiting.rows.length).toBe(1)
      },
      { what: 'a session that waits for its lock' },
    )
    await fresh.close()
    const late = deferred()
    const timer = setTimeout(late.resolve, 5_000)
    expect(await Promise.race([responding, late.promise.then(() => 'it is never answered')])).toBe('closed')
    clearTimeout(timer)
  })

  test('close: a respond that comes while presence pauses after a failure rejects with closed', async () => {
    const sockets = new Sockets()
    const pool = new pg.Pool({ connectionString, stream: sockets.stream })
    const db = new Database(pool, true, schema, sockets)
    await db.open()
    // Nobody listens there. What is written at the end takes longer than the pause.
    const gate = deferred()
    const slow = Object.create(db, { query: { value: () => gate.promise.then(() => []) } }) as Database
    const presence = new Presence(slow, { ...configOf(pool), connectionString: 'postgres://127.0.0.1:1/none' }, () => true)
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] })
    try {
      await expect(presence.register({}, 'first')).rejects.toMatchObject({ code: 'connection' })
      const second = outcome(presence.register({}, 'second'))
      const closed = presence.close()
      // It has come out of its pause, and found nobody to live for.
      await vi.advanceTimersByTimeAsync(3_000)
      gate.resolve()
      await closed
      expect(await second).toBe('closed')
    } finally {
      vi.useRealTimers()
      await db.close()
    }
  })

  test('close does not wait for presence and listening connections that nobody answers', async () => {
    await using relay = await Relay.start(connectionString)
    const fresh = await PostgresBus.connect({ ...options, listenConnectionString: relay.connectionString })
    await using _responder = await fresh.requestReply.respond(freshSubject(), () => 'here')
    // What is lost is made anew, and nobody answers.
    relay.freeze()
    relay.cut()
    await eventually(() => relay.taken >= 2, { what: 'both being made anew' })
    const startedAt = performance.now()
    await fresh.close()
    expect(performance.now() - startedAt).toBeLessThan(3_000)
    // And where the listener has never had one.
    const deaf = await PostgresBus.connect({ ...options, listenConnectionString: relay.connectionString })
    const closedFrom = performance.now()
    await deaf.close()
    expect(performance.now() - closedFrom).toBeLessThan(3_000)
  })

  test('R2 R4 its presence session is terminated: it is found again, and stays so', async () => {
    const subject = freshSubject()
    await using responding = await PostgresBus.connect({ ...options, connectionString: named(connectionString, 'rr presence') })
    await using _responder = await responding.requestReply.respond(subject, () => 'here')
    const holder = async (but: number) => {
      const { rows } = await observer.query(
        `select pid from pg_locks where locktype = 'advisory' and classid::bigint = ${schema}.presence_class()::bigint & 4294967295 and granted
         and pid in (select pid from pg_stat_activity where application_name = 'rr presence') and pid <> $1`,
        [but],
      )
      return (rows[0] as { pid: number } | undefined)?.pid ?? 0
    }
    for (let round = 0, pid = 0; round < 3; round++) {
      const last = pid
      pid = await eventually(() => holder(last), { timeoutMs: 5_000, everyMs: 5, what: 'a new presence session' })
      await observer.query('select pg_terminate_backend($1)', [pid])
      await eventually(async () => expect(await outcome(ask(bus, subject, 1_000))).toBe('ok'), { timeoutMs: 5_000, everyMs: 5 })
    }
  })

  test('R2 R4 every connection of the responding process is terminated, again and again: it is found again within 5 s', async () => {
    const subject = freshSubject()
    await using responding = await PostgresBus.connect({ ...options, connectionString: named(connectionString, 'rr all') })
    await using _responder = await responding.requestReply.respond(subject, () => 'here')
    for (let round = 0; round < 5; round++) {
      await observer.query(`select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'rr all'`)
      await eventually(async () => expect(await outcome(ask(bus, subject, 1_000))).toBe('ok'), { timeoutMs: 5_000, everyMs: 5 })
    }
  })

  test('R2 a process that lives by its lock goes on doing so when LISTEN is doubted and another responder registers', async () => {
    const [first, second] = [freshSubject(), freshSubject()]
    const sockets = new Sockets()
    const pool = new pg.Pool({ connectionString, stream: sockets.stream })
    const db = new Database(pool, true, schema, sockets)
    await db.open()
    let direct = true
    const presence = new Presence(db, configOf(pool), () => direct)
    try {
      await presence.register({}, first)
      direct = false
      await presence.register({}, second)
      await observer.query('select clock_timestamp()')
      const live = async () => {
        const { rows } = await observer.query(
          `select ${schema}.live_responders($1) and ${schema}.live_responders($2) as live,
             (select coalesce(bool_and(alive_until is null or alive_until > clock_timestamp()), false) from ${schema}.responders
              where filter = any (array[$1, $2])) as fresh`,
          [first, second],
        )
        return rows[0] as { live: boolean; fresh: boolean }
      }
      const until = performance.now() + 1_500
      await eventually(
        async () => {
          expect(await live()).toEqual({ live: true, fresh: true })
          return performance.now() > until
        },
        { timeoutMs: 1_600, everyMs: 50, what: 'a second and a half of life' },
      )
      expect(await live()).toEqual({ live: true, fresh: true })
    } finally {
      await presence.close()
      await db.close()
    }
  })

  test('R2 by sign of life: found for as long as it gives one, and gone within a second and a poll after its end', async () => {
    const subject = freshSubject()
    const sockets = new Sockets()
    const pool = new pg.Pool({ connectionString, stream: sockets.stream })
    const db = new Database(pool, true, schema, sockets)
    await db.open()
    const presence = new Presence(db, configOf(pool), () => false)
    const live = async () => {
      const { rows } = await observer.query(`select ${schema}.live_responders($1) as live`, [subject])
      return (rows[0] as { live: boolean }).live
    }
    await presence.register({}, subject)
    const until = performance.now() + 1_500
    while (performance.now() < until) expect(await live()).toBe(true)
    // As if the process had died: nobody says goodbye.
    await db.close()
    await eventually(async () => !(await live()), { timeoutMs: 1_500, everyMs: 10 })
    await presence.close()
  })

  test('R4 what processes that died left behind is removed by maintenance, and costs a request neither time nor locks', async () => {
    const subject = freshSubject()
    await using child = startResponder(subject)
    await child.next(({ ready }) => ready === true)
    await child.kill('SIGKILL')
    const left = async () => {
      const { rows } = await observer.query(`select count(*)::int as count from ${schema}.responders where filter = $1`, [subject])
      return (rows[0] as { count: number }).count
    }
    expect(await left()).toBe(1)
    await using _maintaining = await PostgresBus.connect({ ...options, maintenance: true })
    await eventually(async () => (await left()) === 0, { timeoutMs: 8_000, what: 'the removal of what a dead process left' })
  })
})

describe('what reaches whom', () => {
  test('R1 two responders in two processes, one slow: each request is handled once', async () => {
    const subject = freshSubject()
    await using child = startResponder(subject)
    await child.next(({ ready }) => ready === true)
    const handled: string[] = []
    const gate = deferred()
    await using _slow = await other.requestReply.respond(
      subject,
      async ({ payload }) => {
        handled.push(text(payload))
        await gate.promise
        return payload
      },
      { concurrency: 5 },
    )
    const requests = Array.from({ length: 100 }, (_, n) => bus.requestReply.request(subject, `${n}`, { timeoutMs: 20_000 }))
    await eventually(() => handled.length === 5 || child.unread().length === 100)
    gate.resolve()
    expect((await Promise.all(requests)).map(text)).toEqual(Array.from({ length: 100 }, (_, n) => `${n}`))
    // What the child prints may come later than what it answers.
    await eventually(() => handled.length + child.unread().length >= 100)
    const all = [...handled, ...child.unread().map(({ handling }) => handling as string)]
    expect(all.sort()).toEqual(Array.from({ length: 100 }, (_, n) => `${n}`).sort())
  })

  test('R4 a thousand at once, their replies in random order: each gets its own', async () => {
    const subject = freshSubject()
    await using _responder = await other.requestReply.respond(
      subject,
      async ({ payload }) => {
        await new Promise((resolve) => setTimeout(resolve, Math.random() * 20))
        return payload
      },
      { concurrency: 200 },
    )
    const requests = Array.from({ length: 1_000 }, (_, n) => bus.requestReply.request(subject, `${n}`, { timeoutMs: 20_000 }))
    expect((await Promise.all(requests)).map(text)).toEqual(Array.from({ length: 1_000 }, (_, n) => `${n}`))
  })

  test('R4 a claim whose answer comes after the deadline starts no handler', async () => {
    const subject = freshSubject()
    await using relay = await Relay.start(connectionString)
    const handled: string[] = []
    // One connection: a second claim could be waiting for a new one, whose answers would be held, too.
    const pool = new pg.Pool({ connectionString: named(relay.connectionString, 'rr held'), max: 1 })
    await using stack = new AsyncDisposableStack()
    stack.defer(() => pool.end())
    await using responding = await PostgresBus.connect({
      ...options,
      connectionString: undefined,
      pool,
      listenConnectionString: connectionString,
      pollIntervalMs: NEVER_MS,
    })
    await using _responder = await responding.requestReply.respond(subject, ({ payload }) => {
      handled.push(text(payload))
      return payload
    })
    expect(text(await bus.requestReply.request(subject, 'warm', { timeoutMs: 5_000 }))).toBe('warm')
    await eventually(async () => {
      const { rows } = await observer.query(
        `select bool_and(state = 'idle' and state_change < clock_timestamp() - interval '300 ms') as idle from pg_stat_activity where application_name = 'rr held'`,
      )
      return (rows[0] as { idle: boolean }).idle
    })
    relay.holdAnswers()
    const late = outcome(bus.requestReply.request(subject, 'late', { timeoutMs: 5_000 }))
    const deadline = await eventually(
      async () => {
        const { rows } = await observer.query(
          `select deadline::text as deadline from ${schema}.requests where subject = $1 and claimed_by is not null`,
          [subject],
        )
        return (rows[0] as { deadline: string } | undefined)?.deadline ?? null
      },
      { timeoutMs: 5_000, everyMs: 5, what: 'the claim' },
    )
    expect(await late).toBe('timeout')
    // The deadline is the server's: later than the requester's by as long as the request was on its way.
    await eventually(async () => {
      const { rows } = await observer.query('select clock_timestamp() > $1::timestamptz as over', [deadline])
      return (rows[0] as { over: boolean }).over
    })
    relay.thaw()
    expect(text(await bus.requestReply.request(subject, 'next', { timeoutMs: 10_000 }))).toBe('next')
    expect(handled).toEqual(['warm', 'next'])
  })

  test('R1 a claim that waited for a connection of its pool answers whatever still has time', async () => {
    const subject = freshSubject()
    const pool = new pg.Pool({ connectionString, max: 1 })
    const responding = await PostgresBus.connect({ ...options, connectionString: undefined, pool })
    await responding.requestReply.respond(subject, ({ payload }) => payload)
    expect(text(await ask(bus, subject))).toBe(subject)
    // The app's own statement has the only connection for a good half of the time that the request has.
    const busy = pool.query('select pg_sleep(1.3)')
    const request = outcome(ask(bus, subject, 2_200))
    await busy
    expect(await request).toBe('ok')
    await responding.close()
    await pool.end()
  })

  test('R4 a request that waited for a lock beyond its deadline is not started', async () => {
    const subject = freshSubject()
    const handled: string[] = []
    await using _responder = await other.requestReply.respond(subject, ({ payload }) => {
      handled.push(text(payload))
      return payload
    })
    await using locker = await session(connectionString)
    const rounds = Array.from({ length: 10 }, (_, n) => `next ${n}`)
    for (const next of rounds) {
      await locker.query(`begin; lock table ${schema}.requests in access exclusive mode`)
      expect(await outcome(bus.requestReply.request(subject, 'late', { timeoutMs: 50 }))).toBe('timeout')
      // It waits there, and its deadline is over by the server's clock, too.
      await eventually(async () => {
        const { rowCount } = await observer.query(
          `select from pg_stat_activity where query like '%' || $1 || '%' and wait_event_type = 'Lock'
             and xact_start < clock_timestamp() - interval '50 ms'`,
          [`"${schema}".send_request`],
        )
        return rowCount === 1
      })
      await locker.query('commit')
      expect(text(await bus.requestReply.request(subject, next, { timeoutMs: 10_000 }))).toBe(next)
    }
    expect(handled).toEqual(rounds)
  })

  test('R4 the requester dies: the responder is unaffected, and serves the next', async () => {
    const subject = freshSubject()
    const gate = deferred()
    const begun = deferred()
    await using _responder = await bus.requestReply.respond(subject, async ({ payload }) => {
      if (text(payload) === 'orphan') {
        begun.resolve()
        await gate.promise
      }
      return payload
    })
    await using requester = startChild(new URL('./support/requester-child.ts', import.meta.url), {
      args: [connectionString, schema, subject, 'orphan'],
    })
    await begun.promise
    await requester.kill('SIGKILL')
    gate.resolve()
    expect(text(await other.requestReply.request(subject, 'next', { timeoutMs: 5_000 }))).toBe('next')
  })

  test('R2 the connection of a request is lost: it is rejected or answered by its deadline, and none waits for ever', async () => {
    const subject = freshSubject()
    await using relay = await Relay.start(connectionString)
    await using asking = await PostgresBus.connect({
      ...options,
      connectionString: relay.connectionString,
      listenConnectionString: connectionString,
    })
    await using _responder = await other.requestReply.respond(subject, ({ payload }) => payload)
    const requests: Promise<string>[] = []
    for (let round = 0; round < 10; round++) {
      for (let n = 0; n < 5; n++) requests.push(outcome(asking.requestReply.request(subject, `${round}-${n}`, { timeoutMs: 2_000 })))
      await requests.at(-1 - 4)
      relay.cut()
    }
    for (const result of await Promise.all(requests)) expect(['ok', 'connection', 'timeout']).toContain(result)
    await eventually(async () => expect(await outcome(ask(asking, subject, 1_000))).toBe('ok'), { timeoutMs: 5_000 })
  })
})

describe('a server of its own', () => {
  let server: EmbeddedPostgres

  beforeAll(async () => {
    server = await startEmbeddedPostgres({ settings: { max_notify_queue_pages: '64' } })
  })

  afterAll(() => server.stop('immediate'))

  test('R2 R4 it crashes and comes back with empty tables: the same responder is found again within 5 s', async () => {
    await using responding = await PostgresBus.connect({ connectionString: server.connectionString })
    await using asking = await PostgresBus.connect({ connectionString: server.connectionString })
    await using _responder = await responding.requestReply.respond('crash.>', ({ payload }) => payload)
    expect(text(await ask(asking, 'crash.a'))).toBe('crash.a')
    const before = await asking.requestReply.respond('crashed.too', () => 'again')
    for (const way of ['kill', 'restart'] as const) {
      if (way === 'kill') await server.kill()
      await server.restart()
      await eventually(async () => expect(await outcome(ask(asking, 'crash.a', 1_000))).toBe('ok'), { timeoutMs: 5_000 })
      await eventually(async () => expect(await outcome(ask(responding, 'crashed.too', 1_000))).toBe('ok'), { timeoutMs: 5_000 })
    }
    await before.close()
  })

  test('R2 twenty thousand rows of processes that died do not keep a request from its answer', async () => {
    await using asking = await PostgresBus.connect({ connectionString: server.connectionString, maintenance: false })
    await using dead = await session(server.connectionString)
    await dead.query(
      `insert into klieo.responders (instance_id, filter, pattern)
       select 1000000 + n, 'many', klieo.filter_pattern('many') from generate_series(1, 20000) n`,
    )
    expect(await outcome(ask(asking, 'many'))).toBe('not_found')
    await using _responder = await asking.requestReply.respond('many', () => 'here')
    expect(await outcome(ask(asking, 'many'))).toBe('ok')
  })

  test('R2 a process that lives by its sign of life is found behind a hundred that died', async () => {
    const sockets = new Sockets()
    const pool = new pg.Pool({ connectionString: server.connectionString, stream: sockets.stream })
    const db = new Database(pool, true, 'klieo', sockets)
    await db.open()
    const presence = new Presence(db, configOf(pool), () => false)
    await presence.register({}, 'hundred')
    await db.query(
      `insert into klieo.responders (instance_id, filter, pattern)
       select 2000000 + n, 'hundred', klieo.filter_pattern('hundred') from generate_series(1, 100) n`,
      [],
      'test',
    )
    const [row] = await db.query<{ live: boolean }>(`select klieo.live_responders('hundred') as live`, [], 'test')
    expect(row).toEqual({ live: true })
    await presence.close()
    await db.close()
  })

  test('R1 P14 the notification queue is full: a request is answered all the same', async () => {
    await using asking = await PostgresBus.connect({ connectionString: server.connectionString, pollIntervalMs: 100 })
    await using responding = await PostgresBus.connect({ connectionString: server.connectionString, pollIntervalMs: 100 })
    await using _responder = await responding.requestReply.respond('full', ({ payload }) => payload)
    expect(text(await ask(asking, 'full'))).toBe('full')
    await using sleeper = await session(server.connectionString)
    await using filler = await session(server.connectionString)
    await sleeper.query('listen sleepy')
    await sleeper.query('begin')
    await sleeper.query('select 1')
    const full = await (async () => {
      for (let n = 0; n < 1_000; n++) {
        const result = await filler.query(`select pg_notify('sleepy', repeat('x', 7900))`).catch((error: BusError) => error)
        if (result instanceof Error) return result.code as string
      }
      return 'never'
    })()
    expect(full).toBe('54000')
    expect(text(await ask(asking, 'full'))).toBe('full')
    await asking.pubsub.publish('still', 'goes')
    await sleeper.query('commit')
  })
})

/**
 * Functions, operators and tables of the same names in schemas that a session looks into first. What belongs to the bus must go on
 * calling what it means; a hostile one that is called raises, and so fails the test.
 */

import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type Msg, PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'

const schema = freshSchema()
const evil = freshSchema()
let owner: Session

/** For every function of Postgres whose name the bodies of ours hold, and every operator, one of the same name and types. */
const SAME = `
  do $do$
  declare
    r record;
    v_args text;
  begin
    for r in
      select p.oid, p.proname, pg_get_function_identity_arguments(p.oid) as args, pg_get_function_result(p.oid) as result
      from pg_proc p
      where p.pronamespace = 'pg_catalog'::regnamespace and p.prokind = 'f' and not p.proretset
        and not exists (
          select from unnest(p.proargtypes || p.prorettype) t join pg_type y on y.oid = t
          where y.typtype = 'p' and y.typname not in ('void', 'anyarray', 'anyelement', 'anynonarray', 'anycompatible', 'anycompatiblearray'))
        and exists (select from pg_proc o where o.pronamespace = '${schema}'::regnamespace and o.prosrc ~ ('\\m' || p.proname || '\\M'))
    loop
      execute format('create function ${evil}.%I(%s) returns %s language plpgsql as $$begin raise ''hijacked: %s''; end$$',
        r.proname, regexp_replace(r.args, 'VARIADIC ', ''), r.result, r.proname);
    end loop;
    for r in
      select o.oprname, format_type(o.oprleft, null) as l, format_type(o.oprright, null) as r, format_type(o.oprresult, null) as result, o.oid::bigint as id
      from pg_operator o
      where o.oprnamespace = 'pg_catalog'::regnamespace and o.oprkind = 'b' and o.oprresult <> 0
        and o.oprleft = any ('{text,name,int2,int4,int8,float8,numeric,bool,timestamptz,interval,uuid,xid8,jsonb,bytea,pg_lsn}'::regtype[])
        and o.oprright = any ('{text,name,int2,int4,int8,float8,numeric,bool,timestamptz,interval,uuid,xid8,jsonb,bytea,pg_lsn}'::regtype[])
    loop
      execute format('create function ${evil}.op_%s(%s, %s) returns %s language plpgsql as $$begin raise ''hijacked: operator %s''; end$$',
        r.id, r.l, r.r, r.result, replace(r.oprname, '%', '%%'));
      execute format('create operator ${evil}.%s (leftarg = %s, rightarg = %s, function = ${evil}.op_%s)', r.oprname, r.l, r.r, r.id);
    end loop;
  end
  $do$`

/** Arguments that match better than those of Postgres's own: chosen although its schema comes first. */
const BETTER = `
  create function ${evil}.convert_from(bytea, text) returns text language plpgsql as $$begin raise 'hijacked'; end$$;
  create function ${evil}.left(text, bigint) returns text language plpgsql as $$begin raise 'hijacked'; end$$;
  create function ${evil}.times(double precision, int) returns double precision language plpgsql as $$begin raise 'hijacked'; end$$;
  create function ${evil}.times(numeric, int) returns numeric language plpgsql as $$begin raise 'hijacked'; end$$;
  create operator ${evil}.* (leftarg = double precision, rightarg = int, function = ${evil}.times);
  create operator ${evil}.* (leftarg = numeric, rightarg = int, function = ${evil}.times);
  create operator ${evil}./ (leftarg = double precision, rightarg = int, function = ${evil}.times);
  create operator ${evil}./ (leftarg = numeric, rightarg = int, function = ${evil}.times)`

const TABLES = ['messages', 'jobs', 'kv_entries', 'kv_changes', 'deliveries', 'consumer_offsets', 'meta', 'migrations']

beforeAll(async () => {
  owner = await session(databaseUrl())
  await PostgresBus.migrate({ connectionString: databaseUrl(), schema })
  await owner.query(`create schema ${evil}`)
  await owner.query(SAME)
})

afterAll(async () => {
  await owner.query(`set client_min_messages = warning; drop schema ${evil} cascade`)
  await owner[Symbol.asyncDispose]()
})

describe('before Postgres itself', () => {
  test('what is there in the way is enough to be met', async () => {
    await using client = await session(databaseUrl())
    const { rows } = await client.query<{ functions: number; operators: number }>(
      `select (select count(*)::int from pg_proc where pronamespace = $1::regnamespace) as functions,
         (select count(*)::int from pg_operator where oprnamespace = $1::regnamespace) as operators`,
      [evil],
    )
    expect(rows[0]?.functions).toBeGreaterThan(200)
    expect(rows[0]?.operators).toBeGreaterThan(100)
    await client.query(`set search_path = ${evil}, pg_catalog`)
    await expect(client.query('select clock_timestamp() < now()')).rejects.toThrow('hijacked')
    await expect(client.query(`select 'a'::text = 'b'::text`)).rejects.toThrow('hijacked')
  })

  test('every function of the bus does what it does', async () => {
    await using client = await session(databaseUrl())
    await client.query(`create temp table seen (n int)`)
    for (const table of TABLES) await client.query(`create temp table ${table} (like ${schema}.${table})`)
    await client.query(`set search_path = pg_temp, ${evil}, pg_catalog`)
    const call = async (text: string) => (await client.query<Record<string, unknown>>(text.replaceAll('klieo.', `${schema}.`))).rows
    const value = async (text: string) => Object.values((await call(`select ${text}`))[0] ?? {})[0]

    const seq = await value(`klieo.publish('a.b', '\\x01', '{"a": "b"}', 'id')`)
    expect(await value(`klieo.publish('a.b', '\\x01', '{}', 'id')`)).toBe(seq)
    const durable = await value(`klieo.create_durable('d', 'a.*', 0, null, false)`)
    expect(await call(`select id, filter from klieo.find_durable('d')`)).toEqual([{ id: durable, filter: 'a.*' }])
    const fetched = await call(`select * from klieo.fetch_messages(${durable}, 10, 60000, 100, 2, 1000000)`)
    expect(fetched.map((row) => [row.seq, row.subject, row.headers])).toEqual([
      [seq, 'a.b', { a: 'b' }],
      [null, null, null],
    ])
    const delivery = `array[${durable}], array[${seq}]::bigint[], array['${fetched[0]?.token}']::uuid[]`
    expect(await value(`klieo.extend_deliveries(${delivery}, array[60000]::bigint[])`)).toBe('(1,t)')
    expect(await value(`klieo.nak_deliveries(${delivery}, array[0]::bigint[])`)).toBe(1)
    expect(await value(`klieo.delivery_whereabouts(${durable}, ${seq}, null)`)).toBe('free')
    expect(await value(`klieo.delete_durable('d')`)).toBe(true)

    const id = await value(`klieo.enqueue('q', '\\x02', '{}', 'key')`)
    expect(await value(`klieo.enqueue('q', '\\x02', '{}', 'key')`)).toBe(id)
    await value(`klieo.enqueue_one('q', '\\x03')`)
    const jobs = await call(`select * from klieo.claim_jobs('q', 'w', 60000, 10)`)
    expect(jobs.map((job) => [job.id, job.attempt])).toEqual([
      [id, 1],
      [expect.anything(), 1],
    ])
    expect(await call(`select extended from klieo.heartbeat_job(${id}, '${jobs[0]?.token}', 60000)`)).toEqual([{ extended: true }])
    expect(await value(`klieo.dead_letter_jobs(array[${id}]::bigint[], array['${jobs[0]?.token}']::uuid[], array['no'])`)).toBe(id)
    expect(await value(`klieo.retry_dead('q')`)).toBe('1')
    expect(await value(`klieo.ack_job(${jobs[1]?.id}, '${jobs[1]?.token}')`)).toBe(true)

    await value(`klieo.enqueue('f', '\\x03')`)
    const claim = async () => {
      const [job] = await call(`select id, token from klieo.claim('f', 'w')`)
      return `${job?.id}, '${job?.token}'`
    }
    const first = await claim()
    expect(await value(`klieo.heartbeat(${first})`)).toBeInstanceOf(Date)
    expect(await value(`klieo.nak(${first}, 60000)`)).toBe(true)
    expect((await call(`select outcome from klieo.retry_job(${first.split(',')[0]})`))[0]).toEqual({ outcome: 'retried' })
    expect(await value(`klieo.release(${await claim()})`)).toBe(true)
    expect(await value(`klieo.dead_letter(${await claim()}, 'no')`)).toBe(true)
    expect(await value(`klieo.retry_dead('f')`)).toBe('1')
    expect(await value(`klieo.ack(${await claim()})`)).toBe(true)
    expect(await value(`klieo.subscribe('f', 'f.*')`)).toBe(true)
    await value(`klieo.publish('f.a', '\\x03')`)
    const fetch = async () => {
      const [message] = await call(`select seq, token from klieo.fetch('f')`)
      return `'f', ${message?.seq}, '${message?.token}'`
    }
    const handed = await fetch()
    expect(await value(`klieo.extend_message(${handed})`)).toBe(true)
    expect(await value(`klieo.nak_message(${handed})`)).toBe(true)
    expect(await value(`klieo.release_message(${await fetch()})`)).toBe(true)
    expect(await value(`klieo.ack_message(${await fetch()})`)).toBe(true)
    expect(await value(`klieo.term_message(${handed})`)).toBe(false)
    expect(await value(`klieo.bury('f')`)).toBe(0)
    expect(await value('klieo.channel()')).toMatch(/^klieo_/)
    await value(`klieo.enqueue('p', '\\x03')`)
    expect(await value(`klieo.pause_queue('p')`)).toBe(true)
    expect(await call(`select id from klieo.claim('p', 'w')`)).toEqual([])
    expect(await value(`klieo.resume_queue('p')`)).toBe(true)
    expect(await value(`klieo.purge_queue('p')`)).toBe('1')
    expect(await value(`klieo.seek_durable('f')`)).toBe(true)
    expect(await value(`klieo.purge_messages('f.a')`)).toBe('1')

    const revision = await value(`klieo.kv_put('b', 'k', '\\x04', 60000)`)
    expect(await value(`klieo.kv_cas('b', 'k', '\\x05', ${revision})`)).not.toBeNull()
    expect((await call(`select value from klieo.kv_get('b', 'k')`))[0]?.value).toEqual(Buffer.from([5]))
    expect(await value(`klieo.kv_keys('b', '>', '', 10)`)).toBe('k')
    expect(await value(`klieo.kv_delete('b', 'k')`)).not.toBeNull()
    const token = `'00000000-0000-0000-0000-000000000001'`
    expect(await value(`klieo.take_lease('b', 'k', ${token}, 'me', 60000)`)).toMatch(/^\(1,/)
    expect(await value(`klieo.lease_left('b', 'k')`)).toBeGreaterThan(0)
    expect(await value(`klieo.extend_lease('b', 'k', ${token}, 60000)`)).toBeInstanceOf(Date)
    await value(`klieo.release_lease('b', 'k', ${token})`)

    const process = await value('klieo.new_instance()')
    await value(`klieo.register_responders(${process}, array['r.>'], 60000)`)
    expect(await value(`klieo.send_request(${token}, 'r.a', '{}', '\\x06', 'inbox', 60000, null, null)`)).toBe(true)
    expect(await call(`select subject from klieo.claim_requests('r.>', ${process}, 5)`)).toEqual([{ subject: 'r.a' }])
    expect(await value(`klieo.reply_to_request(${token}, ${process}, true, '\\x07', null, null)`)).toBe('inbox')
    expect(await call(`select ok from klieo.pick_up_replies('inbox')`)).toEqual([{ ok: true }])

    expect(await value(`klieo.elect_maintainer(${token}, 'me', 1)`)).toBe(true)
    await value('klieo.reap_jobs(10)')
    await value('klieo.reap_deliveries(10)')
    await value('klieo.kv_expire(10)')
    await value('klieo.prune_messages(1000000, 10)')
    await value('klieo.prune_kv(10)')
    await value('klieo.prune_rest(1000000, 10)')
    expect(await value('klieo.restored()')).toBe(false)
    expect(await value('klieo.rebase()')).toBe(false)
    for (const view of ['queue_stats', 'consumer_stats', 'job_details', 'message_details', 'bucket_stats'])
      await call(`select * from klieo.${view}`)
    expect(await value('klieo.create_roles()')).toBe(`${schema}_producer`)
    for (const kind of ['producer', 'worker', 'reader', 'admin'])
      await owner.query(`drop owned by ${schema}_${kind}; drop role ${schema}_${kind}`)
    for (const table of TABLES) expect((await owner.query(`select from pg_temp.${table}`).catch(() => ({ rowCount: 0 }))).rowCount).toBe(0)
    for (const table of TABLES) expect(await call(`select 1 from pg_temp.${table}`)).toEqual([])
  })
})

describe('after Postgres itself, as with the usual search_path', () => {
  const better = freshSchema()
  const url = () => {
    const address = new URL(databaseUrl())
    address.searchParams.set('options', `-c search_path=${better}`)
    return address.href
  }

  beforeAll(async () => {
    await owner.query(`create schema ${better}`)
    await owner.query(BETTER.replaceAll(evil, better))
  })

  afterAll(() => owner.query(`set client_min_messages = warning; drop schema ${better} cascade`))

  test('what matches better than a function or operator of Postgres is met by a statement that leaves room for it', async () => {
    await using client = await session(url())
    await expect(client.query(`select date_part('epoch', now()) * 1000`)).rejects.toThrow('hijacked')
    await expect(client.query(`select convert_from('\\x61', 'UTF8')`)).rejects.toThrow('hijacked')
  })

  test('a bus migrates, publishes, consumes, claims, writes, leases and asks past it', async () => {
    const own = freshSchema()
    await PostgresBus.migrate({ connectionString: url(), schema: own })
    const pool = new pg.Pool({ connectionString: url() })
    try {
      await using bus = await PostgresBus.connect({ pool, schema: own, pollIntervalMs: 50 })
      const stream = await bus.pubsub.subscribe('a', 'd', { start: { time: new Date(0) } })
      await bus.pubsub.publish('a', 'x')
      const message = (await stream[Symbol.asyncIterator]().next()).value as Msg
      expect(Math.abs(message.publishedAt.getTime() - Date.now())).toBeLessThan(600_000)
      await message.extend()
      await message.ack()
      await bus.jobs.enqueueMany('q', [{ payload: '1' }, { payload: '2', dedupKey: 'k', delayMs: 1 }])
      await bus.jobs.enqueue('q', { payload: '3', delayMs: 1 })
      const job = await bus.jobs.claim('q', 'w', 60_000)
      expect(job?.lease.expiresAt.getTime()).toBeGreaterThan(Date.now() - 600_000)
      await job?.heartbeat()
      await job?.ack()
      await using watch = await bus.kv.watch('b')
      await bus.kv.put('b', 'k', 'v', { ttlMs: 60_000 })
      await watch[Symbol.asyncIterator]().next()
      expect((await bus.kv.get('b', 'k'))?.updatedAt.getTime()).toBeGreaterThan(Date.now() - 600_000)
      const lease = await bus.kv.lease('b', 'k', 60_000)
      await lease.heartbeat()
      await expect(bus.kv.lease('b', 'k', 60_000, { waitMs: 30 })).rejects.toMatchObject({ code: 'lease_held' })
      await using _responder = await bus.requestReply.respond('r', () => 'reply')
      expect(await bus.requestReply.request('r', '', { timeoutMs: 15_000 })).toHaveLength(5)
    } finally {
      await pool.end()
    }
  })
})

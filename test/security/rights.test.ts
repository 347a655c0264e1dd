/**
 * Who may do what, by the catalogs: every table, view, sequence and function of the schema against the list below. What a migration
 * adds fails here until it is on it.
 */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { KINDS, LOGINS, type Login, RolesStage } from './support/roles-stage.ts'

const CONNECT = { select: ['meta', 'migrations'], execute: ['restored'] }
const PRODUCE = [
  'channel',
  'enqueue',
  'enqueue_many',
  'enqueue_one',
  'pick_up_replies',
  'publish',
  'publish_many',
  'send_request',
  'withdraw_request',
]
const LOOK = {
  select: ['bucket_stats', 'consumer_stats', 'job_details', 'message_details', 'queue_stats'],
  execute: ['as_text', 'kv_get', 'kv_get_many', 'kv_keys'],
}

const EXPECTED: Readonly<Record<Login, { readonly select: readonly string[]; readonly execute: readonly string[] }>> = {
  producer: { select: CONNECT.select, execute: [...CONNECT.execute, ...PRODUCE] },
  worker: {
    select: CONNECT.select,
    execute: [
      ...CONNECT.execute,
      ...PRODUCE,
      ...['find_durable', 'create_durable', 'fetch_messages', 'bury_deliveries', 'delivery_whereabouts'],
      ...['ack_deliveries', 'nak_deliveries', 'extend_deliveries', 'release_deliveries'],
      ...[
        'claim_jobs',
        'take_jobs',
        'ack_job',
        'ack_jobs',
        'nak_jobs',
        'release_jobs',
        'dead_letter_jobs',
        'heartbeat_job',
        'job_whereabouts',
      ],
      ...['claim', 'heartbeat', 'ack', 'nak', 'release', 'dead_letter'],
      ...['subscribe', 'fetch', 'bury', 'ack_message', 'nak_message', 'term_message', 'extend_message', 'release_message'],
      ...['kv_get', 'kv_get_many', 'kv_keys', 'kv_put', 'kv_cas', 'kv_delete', 'kv_write', 'kv_write_soon'],
      ...['kv_entries_at', 'kv_changes_between'],
      ...['take_lease', 'lease_left', 'extend_lease', 'release_lease'],
      ...['presence_class', 'new_instance', 'register_responders', 'sign_of_life', 'claim_requests', 'reply_to_request'],
    ],
  },
  reader: { select: [...CONNECT.select, ...LOOK.select], execute: [...CONNECT.execute, ...LOOK.execute] },
  admin: {
    select: [...CONNECT.select, ...LOOK.select],
    execute: [
      ...CONNECT.execute,
      ...LOOK.execute,
      ...['retry_dead', 'delete_durable', 'rebase', 'elect_maintainer', 'resign_maintainer'],
      ...['retry_job', 'cancel_job', 'remove_job', 'purge_queue', 'pause_queue', 'resume_queue'],
      ...['seek_durable', 'purge_messages', 'purge_messages_from'],
      ...['reap_jobs', 'reap_deliveries', 'kv_expire', 'prune_messages', 'prune_kv', 'prune_rest'],
    ],
  },
  nobody: { select: [], execute: [] },
}

let stage: RolesStage

beforeAll(async () => {
  stage = await RolesStage.open()
})

afterAll(() => stage[Symbol.asyncDispose]())

/** What everybody has been granted in a schema. */
const PUBLIC_RIGHTS = `
  select c.relname as name, a.privilege_type as right
  from pg_class c, aclexplode(coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char", c.relowner))) a
  where c.relnamespace = $1::regnamespace and a.grantee = 0
  union all
  select p.proname, a.privilege_type
  from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
  where p.pronamespace = $1::regnamespace and a.grantee = 0
  union all
  select 'schema', a.privilege_type
  from pg_namespace n, aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
  where n.oid = $1::regnamespace and a.grantee = 0`

describe.each(LOGINS)('%s', (login) => {
  const expected = EXPECTED[login]

  test('may execute these functions and no other', async () => {
    const rows = await stage.rows<{ name: string }>(
      `select p.proname as name from pg_proc p where p.pronamespace = $2::regnamespace and has_function_privilege($1, p.oid, 'execute') order by 1`,
      [stage.login(login), stage.schema],
    )
    expect(rows.map(({ name }) => name)).toEqual([...expected.execute].sort())
  })

  test('may read these views and tables and no other, and write none, not even a column', async () => {
    const rows = await stage.rows<{ name: string; right: string }>(
      `select c.relname as name, r.right
       from pg_class c,
         unnest(array['select', 'insert', 'update', 'delete', 'truncate', 'references', 'trigger']) as r("right")
       where c.relnamespace = $2::regnamespace and c.relkind in ('r', 'v', 'm', 'p', 'f')
         and (has_table_privilege($1, c.oid, r.right)
           or (r.right in ('select', 'insert', 'update', 'references') and has_any_column_privilege($1, c.oid, r.right)))
       order by 1, 2`,
      [stage.login(login), stage.schema],
    )
    expect(rows).toEqual([...expected.select].sort().map((name) => ({ name, right: 'select' })))
  })

  test('may use no sequence, make nothing in the schema, and grant nothing on', async () => {
    const sequences = await stage.rows(
      `select c.relname from pg_class c
       where c.relnamespace = $2::regnamespace and c.relkind = 'S'
         and (has_sequence_privilege($1, c.oid, 'usage') or has_sequence_privilege($1, c.oid, 'select') or has_sequence_privilege($1, c.oid, 'update'))`,
      [stage.login(login), stage.schema],
    )
    expect(sequences).toEqual([])
    const [rights] = await stage.rows(
      `select has_schema_privilege($1, $2, 'usage') as usage, has_schema_privilege($1, $2, 'create') as create,
         (select count(*)::int from pg_proc p where p.pronamespace = $2::regnamespace and has_function_privilege($1, p.oid, 'execute with grant option')) as granting`,
      [stage.login(login), stage.schema],
    )
    expect(rights).toEqual({ usage: login !== 'nobody', create: false, granting: 0 })
  })
})

describe('the schema', () => {
  test('role_rights names everything that is in it, and nothing that is not', async () => {
    const catalog = await stage.rows<{ name: string }>(
      `select proname::text as name from pg_proc where pronamespace = $1::regnamespace
       union all
       select relname::text from pg_class where relnamespace = $1::regnamespace and relkind in ('r', 'v', 'm', 'p', 'f', 'S')`,
      [stage.schema],
    )
    const listed = await stage.rows<{ name: string }>('select distinct name from klieo.role_rights()')
    const names = (rows: { name: string }[]) => rows.map(({ name }) => name).sort()
    // The migrator's lock table is there only where kysely-ctl has run.
    const optional = (name: string) => name !== 'migrations_lock'
    expect(names(listed).filter(optional)).toEqual(names(catalog).filter(optional))
  })

  test('what the owner alone may is in no other list', async () => {
    const rows = await stage.rows(
      `select name from klieo.role_rights() where kind = 'owner' intersect select name from klieo.role_rights() where kind <> 'owner'`,
    )
    expect(rows).toEqual([])
  })

  test('everybody has no right in it', async () => {
    expect(await stage.rows(PUBLIC_RIGHTS, [stage.schema])).toEqual([])
  })

  test('everybody has no right in it either where default privileges give everybody all', async () => {
    const schema = freshSchema()
    await stage.owner.query(`create schema ${schema}`)
    const change = (what: string) => stage.owner.query(`alter default privileges in schema ${schema} ${what}`)
    for (const kind of ['tables', 'sequences', 'functions']) await change(`grant all on ${kind} to public`)
    try {
      await PostgresBus.migrate({ connectionString: databaseUrl(), schema })
      expect(await stage.rows(PUBLIC_RIGHTS, [schema])).toEqual([])
    } finally {
      for (const kind of ['tables', 'sequences', 'functions']) await change(`revoke all on ${kind} from public`)
    }
  })

  test('what others have in the same schema stays as it is', async () => {
    const schema = freshSchema()
    await stage.owner.query(`create schema ${schema}; create function ${schema}.theirs() returns int language sql as 'select 1'`)
    await PostgresBus.migrate({ connectionString: databaseUrl(), schema })
    expect(await stage.rows(PUBLIC_RIGHTS, [schema])).toEqual([{ name: 'theirs', right: 'EXECUTE' }])
  })
})

describe('granting', () => {
  test('it may be repeated, and changes nothing then', async () => {
    const acl = () =>
      stage.rows(
        `select relname as name, relacl::text as acl from pg_class where relnamespace = $1::regnamespace
         union all select proname, proacl::text from pg_proc where pronamespace = $1::regnamespace order by 1`,
        [stage.schema],
      )
    const before = await acl()
    const names = await stage.rows<{ name: string }>('select klieo.create_roles() as name')
    expect(names.map(({ name }) => name)).toEqual(KINDS.map((kind) => `${stage.schema}_${kind}`))
    expect(await acl()).toEqual(before)
  })

  test('a prefix names the roles; a role of any name can be granted a kind, and lose it all again', async () => {
    const odd = `${stage.schema} "x'; --`
    const quoted = stage.owner.escapeIdentifier(odd)
    const rights = () =>
      stage.rows(
        `select p.proname from pg_proc p where p.pronamespace = $2::regnamespace and has_function_privilege($1, p.oid, 'execute')`,
        [odd, stage.schema],
      )
    await stage.owner.query(`create role ${quoted}`)
    try {
      await stage.rows(`select klieo.grant_role('producer', $1)`, [odd])
      await stage.rows(`select klieo.grant_role('reader', $1)`, [odd])
      expect(await rights()).toHaveLength(new Set([...EXPECTED.producer.execute, ...EXPECTED.reader.execute]).size)
      await stage.rows('select klieo.revoke_role($1)', [odd])
      expect(await rights()).toEqual([])
    } finally {
      await stage.owner.query(`drop owned by ${quoted}; drop role ${quoted}`)
    }
    const made = await stage.rows<{ name: string }>('select klieo.create_roles($1) as name', [`${odd} `])
    expect(made.map(({ name }) => name)).toEqual(KINDS.map((kind) => `${odd} ${kind}`))
    for (const { name } of made) {
      const role = stage.owner.escapeIdentifier(name)
      await stage.owner.query(`drop owned by ${role}; drop role ${role}`)
    }
  })

  test('an unknown kind, an unknown role and everybody are refused', async () => {
    const refused = async (text: string, values: readonly unknown[]) =>
      stage.rows(text, values).then(
        () => 'done',
        (error: { code?: string }) => error.code,
      )
    expect(await refused(`select klieo.grant_role('owner', $1)`, [stage.login('nobody')])).toBe('22023')
    expect(await refused('select klieo.grant_role(null, null)', [])).toBe('22023')
    expect(await refused(`select klieo.grant_role('reader', 'public')`, [])).toBe('22023')
    expect(await refused(`select klieo.grant_role('reader', null)`, [])).toBe('42704')
    expect(await refused(`select klieo.grant_role('reader', 'nobody knows it')`, [])).toBe('42704')
    expect(await refused(`select klieo.revoke_role('nobody knows it')`, [])).toBe('42704')
    expect(await refused(`select klieo.create_roles(repeat('x', 60))`, [])).toBe('22023')
  })

  test('only the owner grants', async () => {
    for (const login of LOGINS) {
      await using client = await stage.session(login)
      for (const call of [`grant_role('admin', current_user)`, `revoke_role(current_user)`, 'create_roles()', 'revoke_public()']) {
        await expect(client.query(`select ${stage.schema}.${call}`)).rejects.toMatchObject({ code: '42501' })
      }
    }
  })
})

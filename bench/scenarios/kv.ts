/** Put, get and compare-and-set. */

import pg from 'pg'
import { type Metric, rate } from '../measure.ts'
import { pgbench } from '../pgbench.ts'
import { type ComparedScenario, type OwnScenario, payload, type Setting } from '../scenario.ts'

const CALLERS = 32
const KEYS = 1_000
const PGBENCH_CLIENTS = 16

export const kv: ComparedScenario<'kv'> = {
  name: 'kv',
  title: `key-value, ${CALLERS} callers, ${KEYS.toLocaleString('en')} keys (cas: each caller its own)`,
  kind: 'kv',
  withinS: 90,
  async measure(session, { quick, serverPid }) {
    const options = { callers: CALLERS, ms: quick ? 700 : 2_000, warmUpMs: quick ? 300 : 500, serverPid }
    const keyOf = (caller: number, turn: number) => `key-${(caller * 31 + turn * 7) % KEYS}`
    for (let n = 0; n < KEYS; n += 50)
      await Promise.all(Array.from({ length: 50 }, (_, index) => session.put(`key-${n + index}`, payload(n))))
    const metrics: Metric[] = []
    metrics.push(await rate('put', 'ops/s', options, (caller, turn) => session.put(keyOf(caller, turn), payload(turn))))
    metrics.push(await rate('get', 'ops/s', options, (caller, turn) => session.get(keyOf(caller, turn))))
    const revisions = new Map<number, number>()
    metrics.push(
      await rate('cas', 'ops/s', options, async (caller, turn) => {
        revisions.set(caller, await session.cas(`cas-${caller}`, payload(turn), revisions.get(caller) ?? null))
      }),
    )
    return metrics
  },
}

const SCHEMA = `
  create table bare_kv (key text primary key, revision bigint not null, value bytea not null) with (fillfactor = 70);
  create sequence bare_revision;
  insert into bare_kv select 'key-' || n, nextval('bare_revision'), '\\x00' from generate_series(0, ${KEYS - 1}) n`

const VALUE = `'${'a'.repeat(100)}'`
const KEY = `\\set key random(0, ${KEYS - 1})\n`
const SCRIPTS: Readonly<Record<string, string>> = {
  put: `${KEY}insert into bare_kv (key, revision, value) values ('key-' || :key, nextval('bare_revision'), ${VALUE}) on conflict (key) do update set revision = nextval('bare_revision'), value = excluded.value;\n`,
  get: `${KEY}select revision, value from bare_kv where key = 'key-' || :key;\n`,
  // Each client has a key of its own and reads nothing: only the write is the operation.
  cas: `update bare_kv set revision = nextval('bare_revision'), value = ${VALUE} where key = 'key-' || :client_id and revision > 0 returning revision;\n`,
}

async function measurePgbench({ servers, quick, serverPid }: Setting): Promise<Metric[]> {
  const client = new pg.Client({ connectionString: servers.postgresUrl })
  await client.connect()
  await client.query(SCHEMA)
  await client.end()
  const metrics: Metric[] = []
  for (const [name, script] of Object.entries(SCRIPTS)) {
    const { perSecond, cpu } = await pgbench(servers.postgresUrl, script, { clients: PGBENCH_CLIENTS, seconds: quick ? 1 : 3, serverPid })
    metrics.push({ name, unit: 'ops/s', value: perSecond, cpu })
  }
  return metrics
}

export const kvStatements: OwnScenario = {
  name: 'kv-statements',
  title: `the same as single statements, pgbench, ${PGBENCH_CLIENTS} clients`,
  kind: 'own',
  withinS: 60,
  contenders: { pgbench: measurePgbench },
}

import { session } from '../../../support/sessions.ts'

export interface DatabaseClock {
  /** Sessions of this string read that clock. */
  readonly connectionString: string
  /** So do from now on the functions, defaults and views of a schema, which look into pg_catalog only, whatever the session's path is. */
  govern(schema: string): Promise<void>
  /** @param ms positive: ahead; from where it stands now */
  jump(ms: number): Promise<void>
}

const REBIND = `
  select format('alter function %s set search_path = %I, pg_catalog, pg_temp', oid::regprocedure, $2::text) as statement
  from pg_proc where pronamespace = $1::text::regnamespace
  union all
  select format('alter table %s alter column %I set default %s', d.adrelid::regclass, a.attname, pg_get_expr(d.adbin, d.adrelid))
  from pg_attrdef d
  join pg_class c on c.oid = d.adrelid
  join pg_attribute a on a.attrelid = d.adrelid and a.attnum = d.adnum
  where c.relnamespace = $1::text::regnamespace and a.attgenerated = ''
    and pg_get_expr(d.adbin, d.adrelid) ~ '(clock_timestamp|now|statement_timestamp)\\('
  union all
  select format('create or replace view %s as %s', oid::regclass, pg_get_viewdef(oid))
  from pg_class where relnamespace = $1::text::regnamespace and relkind = 'v'`

/**
 * A clock of the test's own in place of the database's: functions of the same names in a schema that comes before pg_catalog. It runs
 * like the real one, and jumps when it is told to.
 * @param schema is made
 */
export async function startClock(url: string, schema: string): Promise<DatabaseClock> {
  await using client = await session(url)
  await client.query(`create schema ${schema}`)
  await client.query(`create table ${schema}.ahead (by interval not null)`)
  await client.query(`insert into ${schema}.ahead values (interval '0')`)
  for (const [name, volatility] of [
    ['clock_timestamp', 'volatile'],
    ['now', 'stable'],
    ['statement_timestamp', 'stable'],
  ]) {
    await client.query(
      `create function ${schema}.${name}() returns timestamptz language sql ${volatility} as
       'select pg_catalog.${name}() + (select ahead.by from ${schema}.ahead)'`,
    )
  }
  const own = new URL(url)
  own.searchParams.set('options', `-c search_path=${schema},pg_catalog`)
  return {
    connectionString: own.href,
    async govern(bus) {
      // Postgres writes the names without their schema in the first session, and reads them as the clock's in the second.
      await using plain = await session(url)
      await using governed = await session(own.href)
      const { rows } = await plain.query<{ statement: string }>(REBIND, [bus, schema])
      for (const { statement } of rows) await governed.query(statement)
    },
    async jump(ms) {
      await using other = await session(url)
      await other.query(`update ${schema}.ahead set by = by + make_interval(secs => $1)`, [ms / 1_000])
    },
  }
}

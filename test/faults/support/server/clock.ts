import { session } from '../../../support/sessions.ts'

export interface DatabaseClock {
  /** Sessions of this string read that clock. Connect with it before the tables are made: their defaults read it as well. */
  readonly connectionString: string
  /** @param ms positive: ahead; from where it stands now */
  jump(ms: number): Promise<void>
}

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
    async jump(ms) {
      await using other = await session(url)
      await other.query(`update ${schema}.ahead set by = by + make_interval(secs => $1)`, [ms / 1_000])
    },
  }
}

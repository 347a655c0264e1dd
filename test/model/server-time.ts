/** Moves the time of a schema: whatever is dated in its tables becomes older. */

import type pg from 'pg'

export interface DatedColumn {
  readonly table: string
  readonly column: string
  readonly array: boolean
}

/** Kinds of columns that tell a time and that {@link ServerTime} cannot shift: a schema that gets one must teach it. */
const STRANGE = ['timestamp', 'date', 'time', 'timetz', 'tstzrange', 'tsrange', 'daterange', 'tstzmultirange']

/** A durable is told from one that was made anew by when it was made: that is its name, and not moved. */
function isName(table: string, column: string): boolean {
  return table.startsWith('migrations') || (table === 'consumer_offsets' && column === 'created_at')
}

export class ServerTime {
  readonly columns: readonly DatedColumn[]
  readonly tables: readonly string[]
  readonly #pool: pg.Pool
  readonly #schema: string

  private constructor(pool: pg.Pool, schema: string, columns: readonly DatedColumn[], tables: readonly string[]) {
    this.#pool = pool
    this.#schema = schema
    this.columns = columns
    this.tables = tables
  }

  /** From the catalog, so that a new column cannot be forgotten. */
  static async of(pool: pg.Pool, schema: string): Promise<ServerTime> {
    const { rows } = await pool.query<{ table: string; column: string; type: string }>(
      `select c.relname as table, a.attname as column, ltrim(t.typname, '_') as type, t.typname like '\\_%' as array
       from pg_class c
       join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
       join pg_type t on t.oid = a.atttypid
       where c.relnamespace = $1::regnamespace and c.relkind in ('r', 'p')
       order by c.relname, a.attnum`,
      [schema],
    )
    const strange = rows.find(({ type }) => STRANGE.includes(type))
    if (strange) throw new Error(`the time of ${strange.table}.${strange.column} (${strange.type}) cannot be shifted`)
    const dated = rows.filter(({ type, table, column }) => type === 'timestamptz' && !isName(table, column))
    const tables = [...new Set(rows.map(({ table }) => table))].filter((table) => table !== 'meta' && !table.startsWith('migrations'))
    return new ServerTime(pool, schema, dated as unknown as DatedColumn[], tables)
  }

  /** Everything happened so much earlier. */
  async shift(ms: number): Promise<void> {
    const by = `interval '${ms} milliseconds'`
    const byTable = Map.groupBy(this.columns, ({ table }) => table)
    const updates = [...byTable].map(([table, columns]) => {
      const changes = columns.map(({ column, array }) =>
        array
          ? `"${column}" = array(select u.at - ${by} from unnest("${column}") with ordinality as u(at, n) order by u.n)`
          : `"${column}" = "${column}" - ${by}`,
      )
      return `update "${this.#schema}"."${table}" set ${changes.join(', ')}`
    })
    await this.#pool.query(['begin', ...updates, 'commit'].join(';\n'))
  }

  /** When the next thing happens by itself: something expires or becomes due. */
  async nextInMs(): Promise<number> {
    const schema = `"${this.#schema}"`
    const { rows } = await this.#pool.query<{ ms: string | null }>(`
      select extract(epoch from min(d.at) - clock_timestamp()) * 1000 as ms
      from (
        select visible_at as at from ${schema}.deliveries
        union all select visible_at from ${schema}.jobs where died_at is null
        union all select expires_at from ${schema}.kv_entries
        union all select expires_at from ${schema}.kv_leases
        union all select deadline from ${schema}.requests
      ) d
      where d.at > clock_timestamp()`)
    return rows[0]?.ms == null ? Number.POSITIVE_INFINITY : Number(rows[0].ms)
  }

  /** What the elected process does by and by. */
  async maintain(): Promise<void> {
    const schema = `"${this.#schema}"`
    await this.#pool.query(`select count(*) from ${schema}.reap_jobs(500)`)
    await this.#pool.query(`select count(*) from ${schema}.reap_deliveries(500)`)
    await this.#pool.query(`select count(*) from ${schema}.kv_expire(500)`)
    await this.#pool.query(`select ${schema}.prune_messages(604800000, 5000)`)
    await this.#pool.query(`select ${schema}.prune_kv(5000)`)
    await this.#pool.query(`select ${schema}.prune_rest(1209600000, 5000)`)
  }

  async empty(): Promise<void> {
    await this.#pool.query(this.tables.map((table) => `delete from "${this.#schema}"."${table}"`).join(';\n'))
  }
}

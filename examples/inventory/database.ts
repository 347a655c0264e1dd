/** The tables of the inventory itself, and transactions on them: to the bus, an app's own. */

import pg from 'pg'

/** Where one run keeps its data. Names of lower-case letters, digits and `_`: they are written into the statements as they are. */
export interface Schemas {
  readonly inventory: string
  /** The bus's own. */
  readonly bus: string
}

export function connect(connectionString: string): pg.Pool {
  const pool = new pg.Pool({ connectionString, max: 6, connectionTimeoutMillis: 10_000, application_name: 'klieo-bus inventory' })
  // An idle connection that is lost is replaced; without a listener the event would end the process.
  pool.on('error', () => {})
  return pool
}

/** A refused connection to a name with several addresses has an empty message and one error per address. */
export function textOf(error: unknown): string {
  if (error instanceof AggregateError && error.message === '') return error.errors.map(textOf).join(', ')
  return error instanceof Error ? error.message : String(error)
}

export async function createTables(pool: pg.Pool, { inventory }: Schemas): Promise<void> {
  await pool.query(`
    create schema ${inventory};

    create table ${inventory}.packages (
      path text primary key,
      name text not null,
      version text not null,
      job_id text not null
    );

    -- No unique constraint on purpose: it would hide a job whose effect happened twice. The report counts instead.
    create table ${inventory}.results (
      path text not null,
      worker text not null,
      attempt int not null,
      installed boolean not null,
      licence text not null,
      files int not null,
      bytes bigint not null,
      sha256 text not null,
      finished_at timestamptz not null default clock_timestamp()
    );

    -- What the durables "licences" and "sizes" add up.
    create table ${inventory}.licences (licence text primary key, packages int not null);
    create table ${inventory}.sizes (size text primary key, packages int not null, bytes bigint not null);
  `)
}

/** Where the bus takes no part in transactions: what a step is known by that is done a second time, and how often that was. */
export async function createKeys(pool: pg.Pool, { inventory }: Schemas): Promise<void> {
  await pool.query(`
    -- Null: not known.
    alter table ${inventory}.packages alter job_id drop not null, add swept boolean not null default false;

    alter table ${inventory}.results add primary key (path), add tries int not null default 1;

    -- A row for every result that a durable has added.
    create table ${inventory}.added (durable text, path text, tries int not null default 1, primary key (durable, path));
  `)
}

/**
 * Runs `work` in a transaction: commits when it returns, rolls back when it throws. The client it is given is what the
 * bus takes as `tx`.
 */
export async function inTransaction<T>(pool: pg.Pool, work: (tx: pg.PoolClient) => Promise<T>): Promise<T> {
  const client = await pool.connect()
  let broken = false
  // A connection that is lost while it is out says so by an event, and an event without a listener ends the process.
  const onError = () => {
    broken = true
  }
  client.on('error', onError)
  try {
    await client.query('begin')
    const result = await work(client)
    await client.query('commit')
    return result
  } catch (error) {
    await client.query('rollback').catch(onError)
    throw error
  } finally {
    client.off('error', onError)
    client.release(broken)
  }
}

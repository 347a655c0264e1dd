/** The end of a run: figures from the database, what does not add up in them, and the table. */

import type pg from 'pg'
import type { Schemas } from './database.ts'
import { NEVER_COMMITTED } from './never-committed.ts'
import { grouped, megabytes, type Screen } from './screen.ts'
import { QUEUE, RESULTS } from './topics.ts'

/** Each is counted by the database when the work is over. */
export interface Figures {
  readonly packages: number
  readonly enqueued: number
  readonly results: number
  readonly installed: number
  readonly notInstalled: number
  /** Packages without a result. */
  readonly lost: number
  /** Results beyond the first of their package. */
  readonly doubled: number
  /** Results that took more than one attempt. */
  readonly redelivered: number
  /** Jobs still there, and of them the dead ones. */
  readonly jobsLeft: number
  readonly jobsDead: number
  /** Messages on the subjects of the results. */
  readonly published: number
  /** Rows, jobs and results of the transaction that was rolled back. */
  readonly rolledBack: number
  readonly files: number
  readonly bytes: number
  /** What the durable `licences` has added up. */
  readonly licencesCounted: number
  /** What the durable `sizes` has added up. */
  readonly sizesCounted: number
  readonly sizesBytes: number
}

export async function readFigures(pool: pg.Pool | pg.ClientBase, { inventory, bus }: Schemas): Promise<Figures> {
  const { rows } = await pool.query<Figures>(
    `with results as (select * from ${inventory}.results)
     select
       (select count(*) from ${inventory}.packages)::int as packages,
       (select count(distinct job_id) from ${inventory}.packages)::int as enqueued,
       (select count(*) from results)::int as results,
       (select count(*) from results where installed)::int as installed,
       (select count(*) from results where not installed)::int as "notInstalled",
       (select count(*) from ${inventory}.packages p where not exists (select from results r where r.path = p.path))::int as lost,
       (select count(*) - count(distinct path) from results)::int as doubled,
       (select count(*) from results where attempt > 1)::int as redelivered,
       (select count(*) from ${bus}.job_details where queue = $1)::int as "jobsLeft",
       (select count(*) from ${bus}.job_details where queue = $1 and state = 'dead')::int as "jobsDead",
       (select count(*) from ${bus}.message_details where subject in ($2, $3))::int as published,
       (select count(*) from ${inventory}.packages where path = $4)::int
         + (select count(*) from results where path = $4)::int
         + (select count(*) from ${bus}.job_details where queue = $1 and payload_text::json ->> 'path' = $4)::int as "rolledBack",
       (select coalesce(sum(files), 0) from results)::float8 as files,
       (select coalesce(sum(bytes), 0) from results)::float8 as bytes,
       (select coalesce(sum(packages), 0) from ${inventory}.licences)::int as "licencesCounted",
       (select coalesce(sum(packages), 0) from ${inventory}.sizes)::int as "sizesCounted",
       (select coalesce(sum(bytes), 0) from ${inventory}.sizes)::float8 as "sizesBytes"`,
    [QUEUE, RESULTS.installed, RESULTS.missing, NEVER_COMMITTED.path],
  )
  return rows[0]!
}

/**
 * @param listed packages in the lock file
 * @returns a sentence for each figure that does not add up
 */
export function complaints(listed: number, figures: Figures): string[] {
  const { packages, enqueued, results, installed, notInstalled } = figures
  const found: (string | false)[] = [
    packages !== listed && `the lock file lists ${listed} packages, the table holds ${packages}`,
    enqueued !== packages && `${packages} packages, but ${enqueued} jobs`,
    results !== enqueued && `${enqueued} jobs, but ${results} results`,
    installed + notInstalled !== results && `${installed} installed and ${notInstalled} not installed are not ${results} results`,
    figures.lost !== 0 && `${figures.lost} packages have no result`,
    figures.doubled !== 0 && `${figures.doubled} results are there twice`,
    figures.redelivered === 0 && 'a worker was killed at work, but no job was redelivered',
    figures.jobsLeft !== 0 && `${figures.jobsLeft} jobs are still there, ${figures.jobsDead} of them dead`,
    figures.published !== results && `${results} results, but ${figures.published} messages about them`,
    figures.rolledBack !== 0 && 'something of the rolled-back transaction exists',
    figures.licencesCounted !== installed && `${installed} packages installed, but ${figures.licencesCounted} licences counted`,
    figures.sizesCounted !== results && `${results} results, but ${figures.sizesCounted} sizes counted`,
    figures.sizesBytes !== figures.bytes && `${figures.bytes} bytes in the results, but ${figures.sizesBytes} added up`,
  ]
  return found.filter((complaint) => complaint !== false)
}

export interface TopLists {
  readonly largest: readonly { readonly name: string; readonly bytes: number }[]
  readonly licences: readonly { readonly licence: string; readonly packages: number }[]
}

const LINES = 8

export async function readTopLists(pool: pg.Pool, { inventory }: Schemas): Promise<TopLists> {
  const largest = await pool.query<{ name: string; bytes: number }>(
    `select p.name, r.bytes::float8 as bytes
     from ${inventory}.results r join ${inventory}.packages p using (path)
     order by r.bytes desc, p.path limit $1`,
    [LINES],
  )
  const licences = await pool.query<{ licence: string; packages: number }>(
    `select licence, packages from ${inventory}.licences order by packages desc, licence limit $1`,
    [LINES],
  )
  return { largest: largest.rows, licences: licences.rows }
}

export function printReport(screen: Screen, listed: number, figures: Figures, { largest, licences }: TopLists): void {
  const row = (name: string, value: number, remark = '') =>
    screen.print(`  ${name.padEnd(30)}${screen.bold(grouped(value).padStart(7))}${remark && `   ${screen.dim(remark)}`}`)
  screen.print('')
  row('packages in the lock file', listed)
  row('jobs enqueued', figures.enqueued, 'each with its row, in one transaction')
  row('results', figures.results, `${figures.installed} installed + ${figures.notInstalled} not installed here`)
  row('lost', figures.lost)
  row('doubled', figures.doubled)
  row('redelivered', figures.redelivered, 'after kill -9')
  row('left of the rolled back', figures.rolledBack)
  row('files hashed', figures.files, megabytes(figures.bytes))
  row('counted by durable "sizes"', figures.sizesCounted, 'all results')
  row('counted by durable "licences"', figures.licencesCounted, 'the installed ones')
  screen.print('')
  screen.print(`  ${screen.bold('Largest packages'.padEnd(42))}${screen.bold('Licences')}`)
  for (let line = 0; line < Math.max(largest.length, licences.length); line++) {
    const left = largest[line]
    const right = licences[line]
    const leftText = left ? `${clip(left.name, 26).padEnd(27)}${megabytes(left.bytes).padStart(9)}` : ''
    const rightText = right ? `${clip(right.licence, 24).padEnd(25)}${grouped(right.packages).padStart(5)}` : ''
    screen.print(`  ${leftText.padEnd(42)}${rightText}`.trimEnd())
  }
  screen.print('')
}

function clip(text: string, width: number): string {
  return text.length <= width ? text : `${text.slice(0, width - 3)}...`
}

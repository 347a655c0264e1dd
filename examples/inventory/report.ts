/** The end of a run: figures from the database, what does not add up in them, and the table. */

import type { Bus } from 'klieo-bus'
import type pg from 'pg'
import type { Schemas } from './database.ts'
import type { NatsPlace } from './nats.ts'
import { NEVER_COMMITTED } from './never-committed.ts'
import { grouped, megabytes, type Screen } from './screen.ts'
import { QUEUE, RESULTS } from './topics.ts'
import type { Words } from './words.ts'

/** Each is counted by the database when the work is over, in the app's own tables … */
export interface Counts {
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
  /** Rows and results of the transaction that was rolled back. */
  readonly rolledBack: number
  readonly files: number
  readonly bytes: number
  /** What the durable `licences` has added up. */
  readonly licencesCounted: number
  /** What the durable `sizes` has added up. */
  readonly sizesCounted: number
  readonly sizesBytes: number
}

/** … and by the bus. */
export interface BusCounts {
  /** Jobs still there, and of them the dead ones. */
  readonly jobsLeft: number
  readonly jobsDead: number
  /** Jobs of the transaction that was rolled back. */
  readonly jobsRolledBack: number
  /** Messages on the subjects of the results. */
  readonly published: number
}

/** What the keys were good for, where the bus takes no part in transactions. */
export interface KeyCounts {
  /** Results, and additions of a durable, that were tried again although they were there. */
  readonly resultsAgain: number
  readonly additionsAgain: number
  /** Jobs that the sweep has enqueued. */
  readonly swept: number
}

export interface Figures extends Counts, BusCounts {
  readonly keys?: KeyCounts
}

export async function readCounts(pool: pg.Pool | pg.ClientBase, { inventory }: Schemas): Promise<Counts> {
  const { rows } = await pool.query<Counts>(
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
       (select count(*) from ${inventory}.packages where path = $1)::int
         + (select count(*) from results where path = $1)::int as "rolledBack",
       (select coalesce(sum(files), 0) from results)::float8 as files,
       (select coalesce(sum(bytes), 0) from results)::float8 as bytes,
       (select coalesce(sum(packages), 0) from ${inventory}.licences)::int as "licencesCounted",
       (select coalesce(sum(packages), 0) from ${inventory}.sizes)::int as "sizesCounted",
       (select coalesce(sum(bytes), 0) from ${inventory}.sizes)::float8 as "sizesBytes"`,
    [NEVER_COMMITTED.path],
  )
  return rows[0]!
}

/** The bus's own views, in the same database. */
export async function readBusCounts(pool: pg.Pool | pg.ClientBase, { bus }: Schemas): Promise<BusCounts> {
  const { rows } = await pool.query<BusCounts>(
    `select
       (select count(*) from ${bus}.job_details where queue = $1)::int as "jobsLeft",
       (select count(*) from ${bus}.job_details where queue = $1 and state = 'dead')::int as "jobsDead",
       (select count(*) from ${bus}.job_details where queue = $1 and payload_text::json ->> 'path' = $2)::int as "jobsRolledBack",
       (select count(*) from ${bus}.message_details where subject in ($3, $4))::int as published`,
    [QUEUE, NEVER_COMMITTED.path, RESULTS.installed, RESULTS.missing],
  )
  return rows[0]!
}

/** What the bus itself lists, on any backend; of the messages only NATS knows how many there are. */
export async function askBusCounts(bus: Bus, nats: NatsPlace): Promise<BusCounts> {
  const counts = { jobsLeft: 0, jobsDead: 0, jobsRolledBack: 0 }
  for await (const { state, dedupKey } of bus.admin.jobs({ queue: QUEUE })) {
    counts.jobsLeft++
    if (state === 'dead') counts.jobsDead++
    if (dedupKey === NEVER_COMMITTED.path) counts.jobsRolledBack++
  }
  return { ...counts, published: await nats.countMessages(RESULTS.all) }
}

export async function readKeyCounts(pool: pg.Pool, { inventory }: Schemas): Promise<KeyCounts> {
  const { rows } = await pool.query<KeyCounts>(
    `select
       (select sum(tries - 1) from ${inventory}.results)::int as "resultsAgain",
       (select sum(tries - 1) from ${inventory}.added)::int as "additionsAgain",
       (select count(*) from ${inventory}.packages where swept)::int as swept`,
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
    figures.rolledBack + figures.jobsRolledBack !== 0 && 'something of the rolled-back transaction exists',
    figures.licencesCounted !== installed && `${installed} packages installed, but ${figures.licencesCounted} licences counted`,
    figures.sizesCounted !== results && `${results} results, but ${figures.sizesCounted} sizes counted`,
    figures.sizesBytes !== figures.bytes && `${figures.bytes} bytes in the results, but ${figures.sizesBytes} added up`,
    figures.keys?.resultsAgain === 0 && 'a worker was killed after its result, but no result was tried again',
    figures.keys?.swept === 0 && 'rows were left without a job, but the sweep found none',
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

export function printReport(screen: Screen, listed: number, figures: Figures, { largest, licences }: TopLists, words: Words): void {
  const row = (name: string, value: number, remark = '') =>
    screen.print(`  ${name.padEnd(30)}${screen.bold(grouped(value).padStart(7))}${remark && `   ${screen.dim(remark)}`}`)
  const { keys } = figures
  screen.print('')
  row('packages in the lock file', listed)
  row('jobs enqueued', figures.enqueued, words.enqueued)
  row('results', figures.results, `${figures.installed} installed + ${figures.notInstalled} not installed here`)
  row('lost', figures.lost)
  row('doubled', figures.doubled, words.doubled)
  row('redelivered', figures.redelivered, 'after kill -9')
  if (keys) {
    row(
      'tried again',
      keys.resultsAgain + keys.additionsAgain,
      `results ${keys.resultsAgain}, sums ${keys.additionsAgain}: harmless by key`,
    )
    row('enqueued by the sweep', keys.swept, 'rows whose job was not known')
  }
  row('left of the rolled back', figures.rolledBack + figures.jobsRolledBack)
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

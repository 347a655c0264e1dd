import { command } from '../command.ts'
import { connectionOf, explained } from '../connection.ts'
import { EXIT, UsageError } from '../failure.ts'

const migrate = command({
  name: 'migrate',
  summary: 'bring the schema up to date',
  details: 'Migrations go forward only: to go back, restore a dump. A release works with the schema of the next one.',
  arguments: {},
  options: {
    check: { type: 'flag', description: 'only look: exit 0 when it is up to date, 1 when it is not' },
    sql: { type: 'flag', description: 'only print the SQL that would run, for whoever may run it with psql' },
    down: { type: 'flag', description: 'refused: it would lose messages' },
  },
  examples: [
    { line: 'klieo-bus migrate', says: 'prints each migration that it applied' },
    { line: 'klieo-bus migrate --check', says: 'prints each that is missing; for a deploy, or a health check' },
    {
      line: 'klieo-bus migrate --sql | psql -v ON_ERROR_STOP=1 "$DATABASE_URL"',
      says: 'the same as klieo-bus migrate, in one transaction',
    },
  ],
  exitCodes: { 1: 'failed; with --check: not up to date' },
  async run({ options: { check, sql, down } }, { output, target }) {
    if (down) {
      throw new UsageError(
        'migrate has no way down: dropping what a migration made would lose the messages, jobs and keys in it; restore a dump instead, or drop the schema if nothing in it is needed',
        { seeHelp: false },
      )
    }
    if (check && sql) throw new UsageError('migrate takes one of --check and --sql')
    const { PostgresBus } = await import('../../index.ts')
    const connection = connectionOf(target)
    if (sql) {
      const text = await explained(target, () => PostgresBus.migrationSql(connection))
      if (text === '' && !output.json) output.note(`schema "${target.schema}" is up to date`)
      else await output.result({ sql: text }, text.trimEnd())
      return EXIT.done
    }
    const names = await explained(target, () => PostgresBus.migrate({ ...connection, check }))
    const word = check ? 'missing' : 'applied'
    for (const name of names) await output.result({ migration: name, [word]: true }, `${word} ${name}`)
    if (check && names.length > 0) return EXIT.failed
    await output.result({ schema: target.schema, upToDate: true }, `schema "${target.schema}" is up to date`)
    return EXIT.done
  },
})

export const COMMANDS = [migrate]

import { createHash } from 'node:crypto'
import { invalid } from '../core/index.ts'

export const DEFAULT_SCHEMA = 'klieo'

/** @throws invalid_argument */
export function checkSchema(value: unknown): asserts value is string {
  if (typeof value !== 'string' || !/^[A-Za-z_][A-Za-z0-9_-]{0,62}$/.test(value) || value.startsWith('pg_')) {
    throw invalid('schema', value, 'must be 1 to 63 characters of A-Z a-z 0-9 _ -, beginning with a letter or _, but not with pg_')
  }
}

/** The only place where a name becomes part of a statement. */
export function quoteIdentifier(name: string): string {
  return `"${name.replaceAll('"', '""')}"`
}

/** For the statements that messages recommend; values of our own statements are parameters. */
function quoteLiteral(text: string): string {
  return `'${text.replaceAll("'", "''")}'`
}

/** What the owner of the schema runs so that the role may do what a kind of role may (docs/security.md). */
export function grantStatement(schema: string, kind: RoleKind, role: string): string {
  const quoted = /^[a-z_][a-z0-9_]*$/.test(schema) ? schema : quoteIdentifier(schema)
  return `select ${quoted}.grant_role(${quoteLiteral(kind)}, ${quoteLiteral(role)})`
}

/** What gives the owner of the schema back what it owns. */
export function ownersGrants(schema: string): string {
  const what = ['tables', 'sequences', 'functions']
  return what.map((kind) => `grant all on all ${kind} in schema ${quoteIdentifier(schema)} to <owner>`).join('; ')
}

/** The kinds of roles that the schema knows: klieo.role_rights(). */
export type RoleKind = 'producer' | 'worker' | 'reader' | 'admin'

/** A statement or migration that is written for the schema `klieo`, for another one. */
export function inSchema(sql: string, schema: string): string {
  if (schema === DEFAULT_SCHEMA) return sql
  const quoted = quoteIdentifier(schema)
  return sql
    .replace(/\bklieo\.(?=[a-z_])/g, `${quoted}.`)
    .replaceAll('create schema if not exists klieo;', `create schema if not exists ${quoted};`)
}

/** The notification channel of a schema: short, lower case, the same for everyone. */
export function channelOf(schema: string): string {
  return `klieo_${createHash('sha256').update(schema).digest('hex').slice(0, 16)}`
}

/** A schema with a login for each kind of role, and one that has been granted nothing. */

import type pg from 'pg'
import { PostgresBus, type PostgresBusOptions } from '../../../src/index.ts'
import { databaseUrl, freshSchema } from '../../support/server.ts'
import { type Session, session } from '../../support/sessions.ts'

export const KINDS = ['producer', 'worker', 'reader', 'admin'] as const
export type Kind = (typeof KINDS)[number]
export type Login = Kind | 'nobody'
export const LOGINS: readonly Login[] = [...KINDS, 'nobody']
const PASSWORD = 'pa55'

export class RolesStage implements AsyncDisposable {
  readonly schema: string
  /** The owner's session. */
  readonly owner: Session

  private constructor(schema: string, owner: Session) {
    this.schema = schema
    this.owner = owner
  }

  static async open(): Promise<RolesStage> {
    const schema = freshSchema()
    await PostgresBus.migrate({ connectionString: databaseUrl(), schema })
    const stage = new RolesStage(schema, await session(databaseUrl()))
    await stage.owner.query(`select ${schema}.create_roles()`)
    for (const login of LOGINS) await stage.owner.query(`create role ${stage.login(login)} login password '${PASSWORD}'`)
    for (const kind of KINDS) await stage.owner.query(`grant ${schema}_${kind} to ${stage.login(kind)}`)
    return stage
  }

  login(login: Login): string {
    return `${this.schema}_${login}_login`
  }

  url(login: Login): string {
    const url = new URL(databaseUrl())
    url.username = this.login(login)
    url.password = PASSWORD
    return url.href
  }

  /** Without maintenance: a test that is about it asks for it. */
  connect(login: Login, options: PostgresBusOptions = {}): Promise<PostgresBus> {
    return PostgresBus.connect({
      connectionString: this.url(login),
      schema: this.schema,
      migrate: false,
      maintenance: false,
      pollIntervalMs: 100,
      ...options,
    })
  }

  session(login: Login): Promise<Session> {
    return session(this.url(login))
  }

  async rows<R extends pg.QueryResultRow>(text: string, values: readonly unknown[] = []): Promise<R[]> {
    return (await this.owner.query<R>(text.replaceAll('klieo.', `${this.schema}.`), [...values])).rows
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const roles = [...LOGINS.map((login) => this.login(login)), ...KINDS.map((kind) => `${this.schema}_${kind}`)]
    for (const role of roles) await this.owner.query(`drop owned by ${role}; drop role ${role}`)
    await this.owner[Symbol.asyncDispose]()
  }
}

/** The SQLSTATE with which a statement fails; undefined: it does not. */
export async function stateOf(client: pg.ClientBase, text: string, values: readonly unknown[] = []): Promise<string | undefined> {
  try {
    await client.query(text, [...values])
    return undefined
  } catch (error) {
    return (error as { code?: string }).code
  }
}

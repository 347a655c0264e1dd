import pg from 'pg'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl } from '../support/server.ts'

/** A database of its own, in which the schema has its default name. */
export class FreshDatabase implements AsyncDisposable {
  readonly name: string
  readonly url: string

  private constructor(name: string) {
    this.name = name
    this.url = Object.assign(new URL(databaseUrl()), { pathname: `/${name}` }).href
  }

  /** @param options.migrate false: an empty one */
  static async make({ migrate = true }: { readonly migrate?: boolean } = {}): Promise<FreshDatabase> {
    const database = new FreshDatabase(`docs_${crypto.randomUUID().replaceAll('-', '')}`)
    await onServer(`create database ${database.name}`)
    if (migrate) await PostgresBus.migrate({ connectionString: database.url })
    return database
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await onServer(`drop database ${this.name} with (force)`)
  }
}

export function onServer(...statements: readonly string[]): Promise<void> {
  return withClient(databaseUrl(), async (client) => {
    for (const statement of statements) await client.query(statement)
  })
}

export async function withClient<T>(connectionString: string, use: (client: pg.Client) => Promise<T>): Promise<T> {
  const client = new pg.Client({ connectionString })
  await client.connect()
  try {
    return await use(client)
  } finally {
    await client.end()
  }
}

import { type Session, session } from '../../support/sessions.ts'

/** A session whose transactions are READ COMMITTED whatever the server's default: the interleavings are written for that. */
export async function rival(url: string): Promise<Session> {
  const client = await session(url)
  await client.query(`set default_transaction_isolation = 'read committed'`)
  return client
}

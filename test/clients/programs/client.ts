import type { PostgresTx } from 'klieo-bus'

export interface OpenTransaction {
  /** As the client's users pass it. */
  readonly tx: PostgresTx
  /** A row of `rows (id int primary key)`, written as the client's users write it. */
  insert(id: number): Promise<unknown>
}

/** A client of Postgres with its own way to begin, to write and to end. */
export interface Client {
  /** Commits when `work` resolves; rolls back and rejects when it rejects. */
  transaction(work: (open: OpenTransaction) => Promise<void>): Promise<unknown>
  /** A transaction inside of one: what `work` did is rolled back when it rejects. Left out where the client has none. */
  nested?(open: OpenTransaction, work: (inner: OpenTransaction) => Promise<void>): Promise<unknown>
  /** What is no transaction, as somebody might pass it. */
  readonly mistaken: Readonly<Record<string, () => PostgresTx>>
  /** Whether a transaction that is over is known for it. */
  readonly knowsOver: boolean
}

export type Connect = (connectionString: string) => Promise<Client>

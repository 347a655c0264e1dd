import { CompiledQuery } from 'kysely'
import { type AdaptedTx, hasMethods, notATransaction } from './adapted.ts'

/** An EntityManager of MikroORM 7. */
export interface MikroOrmEntityManager {
  /** The Kysely transaction that MikroORM has open, if it has one. */
  getTransactionContext(): unknown
}

interface KyselyTransaction {
  executeQuery(query: CompiledQuery): Promise<{ rows: unknown[] }>
}

/**
 * The entity manager inside `em.transactional` or after `em.begin`. Statements of the bus are sent at once, those of the entities when
 * MikroORM flushes; both are in the transaction. `em.execute` is no way for them: it writes the values into the statement.
 * @throws invalid_argument outside of a transaction
 */
export function mikroOrmTx(em: MikroOrmEntityManager): AdaptedTx {
  const transaction = hasMethods(em, ['getTransactionContext']) ? em.getTransactionContext() : undefined
  if (!hasMethods(transaction, ['executeQuery'])) throw notATransaction(em, 'an entity manager of MikroORM 7 inside a transaction')
  return {
    query: (text, values) => (transaction as KyselyTransaction).executeQuery(CompiledQuery.raw(text, values)),
  }
}

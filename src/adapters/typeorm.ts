import { reading } from '../core/index.ts'
import { type AdaptedTx, driverError, hasMethods, notATransaction, over } from './adapted.ts'

/** TypeORM's connection with a transaction open. */
export interface TypeormQueryRunner {
  readonly isTransactionActive: boolean
  readonly isReleased: boolean
  query(query: string, parameters: never): PromiseLike<unknown>
}

/** TypeORM's EntityManager; a DataSource has no `save`. */
export interface TypeormEntityManager {
  readonly queryRunner?: TypeormQueryRunner | undefined
  save(entity: never): unknown
}

/**
 * The manager that `dataSource.transaction` hands its callback, or a query runner whose transaction has begun.
 * @throws invalid_argument for a DataSource, its own manager, and a query runner without a transaction
 */
export function typeormTx(tx: TypeormEntityManager | TypeormQueryRunner): AdaptedTx {
  const runner = reading('tx', tx, () => runnerOf(tx))
  if (!hasMethods(runner, ['query']) || !isOpen(runner)) {
    throw notATransaction(tx, 'the manager that dataSource.transaction hands its callback, or a query runner that has begun')
  }
  const query = runner.query.bind(runner) as (query: string, parameters: unknown[]) => PromiseLike<unknown[]>
  return {
    async query(text, values) {
      if (!isOpen(runner)) throw over()
      try {
        return { rows: await query(text, values) }
      } catch (error) {
        throw driverError(error, 'driverError')
      }
    },
  }
}

function runnerOf(tx: TypeormEntityManager | TypeormQueryRunner | null | undefined): TypeormQueryRunner {
  if (typeof tx !== 'object' || tx === null) throw notATransaction(tx, 'a manager or query runner of TypeORM')
  return ('isTransactionActive' in tx ? tx : tx.queryRunner) as TypeormQueryRunner
}

function isOpen(runner: TypeormQueryRunner): boolean {
  return runner.isTransactionActive === true && runner.isReleased !== true
}

import { type AdaptedTx, hasMethods, notATransaction, over } from './adapted.ts'

/** What Prisma's interactive transaction hands its callback; the client itself can `$connect`. */
export interface PrismaTransaction {
  $queryRawUnsafe(query: string, ...values: never[]): PromiseLike<unknown>
  readonly $connect?: never
}

/**
 * The client that `prisma.$transaction(async (tx) => …)` hands its callback.
 * @throws invalid_argument for the client itself
 */
export function prismaTx(tx: PrismaTransaction): AdaptedTx {
  if (!hasMethods(tx, ['$queryRawUnsafe']) || hasMethods(tx, ['$connect'])) {
    throw notATransaction(tx, 'what prisma.$transaction hands its callback, not the client itself')
  }
  const query = tx.$queryRawUnsafe.bind(tx) as (query: string, ...values: unknown[]) => PromiseLike<unknown[]>
  return {
    async query(text, values) {
      try {
        return { rows: await query(text, ...values) }
      } catch (error) {
        throw serverError(error)
      }
    },
  }
}

/** What Prisma throws, and what `@prisma/adapter-pg` keeps in it of the driver's error. */
interface PrismaError {
  readonly code?: unknown
  readonly message?: unknown
  readonly meta?: { readonly driverAdapterError?: { readonly cause?: Original } } | undefined
}

interface Original {
  readonly originalCode?: unknown
  readonly originalMessage?: unknown
  readonly kind?: unknown
}

const NO_LONGER_OPEN = 'P2028'
const CHECK_VIOLATION = '23514'
/** What of the network Prisma has a name of its own for. */
const CODES: Readonly<Record<string, string>> = { ConnectionClosed: 'ECONNRESET', SocketTimeout: 'ETIMEDOUT' }

/**
 * The server's error as a driver would have thrown it. Prisma's own is not kept as a cause: it repeats the row that was refused.
 * Its codes would be taken for SQLSTATEs.
 */
function serverError(reason: unknown): unknown {
  if (!(reason instanceof Error)) return reason
  const { code, message, meta } = reason as PrismaError & Error
  if (code === NO_LONGER_OPEN) return over()
  const original = meta?.driverAdapterError?.cause ?? (reason.cause as Original | undefined)
  const state = original?.originalCode
  if (typeof state !== 'string') {
    const known = CODES[String(original?.kind)]
    return Object.assign(new Error(message), known === undefined ? {} : { code: known })
  }
  const text = String(original?.originalMessage)
  // The name of the constraint is in the text alone, in the quotes of the server's language.
  const constraint = state === CHECK_VIOLATION ? /\w+_size\b/.exec(text)?.[0] : undefined
  return Object.assign(new Error(text), { code: state, ...(constraint === undefined ? {} : { constraint }) })
}

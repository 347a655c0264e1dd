import { PrismaPg } from '@prisma/adapter-pg'
import { prismaTx } from 'klieo-bus/adapters/prisma'
import type { Client, OpenTransaction } from './client.ts'
import { type Prisma, PrismaClient } from './generated/client.ts'

export async function connect(connectionString: string): Promise<Client> {
  const prisma = new PrismaClient({ adapter: new PrismaPg({ connectionString, max: 2 }) })
  const opened = (tx: Prisma.TransactionClient): OpenTransaction => ({
    tx: prismaTx(tx),
    insert: (id) => tx.row.create({ data: { id } }),
  })
  return {
    transaction: (work) => prisma.$transaction((tx) => work(opened(tx)), { timeout: 20_000 }),
    // @ts-expect-error the client itself
    mistaken: { client: () => prismaTx(prisma), nothing: () => prismaTx(undefined as never) },
    knowsOver: true,
  }
}

/** A client that has been extended. */
export async function connectExtended(connectionString: string): Promise<Client> {
  const prisma = new PrismaClient({ adapter: new PrismaPg({ connectionString, max: 2 }) }).$extends({
    query: { $allModels: { $allOperations: ({ args, query }) => query(args) } },
    model: { row: { nothing: () => 0 } },
  })
  return {
    transaction: (work) =>
      prisma.$transaction((tx) => work({ tx: prismaTx(tx), insert: (id) => tx.row.create({ data: { id } }) }), { timeout: 20_000 }),
    // @ts-expect-error the client itself
    mistaken: { client: () => prismaTx(prisma) },
    knowsOver: true,
  }
}

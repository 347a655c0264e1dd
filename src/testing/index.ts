/** For tests: a real Postgres without installing one, and the suite that every backend passes. */

export * from './conformance/index.ts'
export * from './embedded-postgres.ts'

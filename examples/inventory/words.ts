/** What the screen says of steps that the two backends take differently. */

import type { Backend } from './backend.ts'

export interface Words {
  readonly rowAndJob: string
  /** The same in the table, and what is said of results there. */
  readonly enqueued: string
  readonly doubled: string
  /** Before what a worker pauses, to be killed at the worst moment … */
  readonly pausesBefore: string
  /** … and what it has done by then. */
  readonly half: string
  readonly rollBack: string
}

export const WORDS: Readonly<Record<Backend, Words>> = {
  postgres: {
    rowAndJob: 'a row and a job, in one transaction',
    enqueued: 'each with its row, in one transaction',
    doubled: '',
    pausesBefore: 'commit',
    half: 'result written, job acked, but the transaction was not committed',
    rollBack: 'a transaction with a row and a job is rolled back: neither may exist',
  },
  nats: {
    rowAndJob: 'a row, and once it is committed a job',
    enqueued: 'each after its row, once by its key',
    doubled: 'a second one is refused by its key',
    pausesBefore: 'ack',
    half: 'result committed, message published, but the job was not acked',
    rollBack: 'the transaction of a row is rolled back before its job is enqueued: neither may exist',
  },
}

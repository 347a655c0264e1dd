/** The backend in one process, which promises the same. */

import type { Mutant } from '../mutant.ts'

const LOG = 'src/memory/log.ts'
const JOBS = 'src/memory/job-table.ts'
const ENTRIES = 'src/memory/entries.ts'
const MEMORY = 'test/conformance/memory.test.ts'

export const memoryMutants: readonly Mutant[] = [
  {
    id: 'memory-no-redelivery',
    rule: 'P5',
    guarantee: 'a message that is not settled within ackWaitMs, or was naked, is delivered again',
    broken: 'each message is handed out once',
    edits: [{ file: LOG, find: 'one.visibleAt <= now && fetched.length < limit', replace: 'one.visibleAt < 0 && fetched.length < limit' }],
    files: [MEMORY],
    caughtBy: ['P5 a message nobody settled comes again after its ack wait', 'P5 a nak brings the message back at once'],
    beside: ['P8 messages published one after the other come in that order'],
  },
  {
    id: 'memory-messages-unfenced',
    rule: 'P7',
    guarantee: 'once a message has been handed out again, settlements of the older delivery are refused and change nothing',
    broken: 'a settlement does not compare the token',
    edits: [
      {
        file: LOG,
        find: 'return unsettled.token === token ? unsettled : undefined',
        replace: 'return token !== 0 ? unsettled : undefined',
      },
    ],
    files: [MEMORY],
    caughtBy: [' of the older delivery is refused and changes nothing'],
    beside: ['P8 messages published one after the other come in that order'],
  },
  {
    id: 'memory-jobs-unfenced',
    rule: 'J6',
    guarantee: 'once a job has been claimed again, settlements of the older claim are refused and change nothing',
    broken: 'a settlement does not compare the token',
    edits: [{ file: JOBS, find: 'return row.token === token ? row : undefined', replace: 'return token !== 0 ? row : undefined' }],
    files: [MEMORY],
    caughtBy: [' of the older claim is refused and changes nothing'],
    beside: ['J1 an enqueued job is claimed with everything'],
  },
  {
    id: 'memory-lease-not-strict',
    rule: 'K5',
    guarantee: 'after its expiry a heartbeat is refused, even if nobody took the lease',
    broken: 'whoever held it last may take it up again',
    edits: [{ file: ENTRIES, find: 'held?.fence !== fence || held.expiresAt <= now', replace: 'held?.fence !== fence' }],
    files: [MEMORY],
    caughtBy: ['K5 expiry is strict: afterwards heartbeat is refused'],
    beside: ['K5 release frees the key at once'],
  },
  {
    id: 'memory-retention-by-age',
    rule: 'P13',
    guarantee: 'a message is removed when it is too old and every durable is past it, not before',
    broken: 'what is old enough goes',
    edits: [{ file: LOG, find: 'end = Math.min(end, next)', replace: 'end = Math.max(end, next)' }],
    files: ['test/memory/time.test.ts'],
    caughtBy: ['P13 a message goes when it is too old and every durable is past it', 'P13 a pruned log neither skips nor repeats'],
    beside: ['P12 a msgId is remembered for two minutes from the first publish'],
  },
  {
    id: 'memory-message-id-window',
    rule: 'P12',
    guarantee: 'a msgId is remembered for two minutes from the first publish',
    broken: 'it is remembered for ever',
    edits: [{ file: LOG, find: 'if (expiresAt > now) break', replace: 'if (expiresAt > 0) break' }],
    files: ['test/memory/time.test.ts'],
    caughtBy: ['P12 a msgId is remembered for two minutes from the first publish'],
    beside: ['P5 a nak with a delay comes back when the delay is over'],
  },
]

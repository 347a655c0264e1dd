/** Typed contracts: what does not match is refused, or buried with its reason, and never lost. */

import type { Mutant } from '../mutant.ts'

const FORMAT = 'src/contracts/format.ts'
const LETTER = 'src/runtime/dead-letter.ts'
const STREAM = 'src/contracts/stream.ts'
const SUBJECTS = 'test/contracts/subject.test.ts'
const LETTERS = 'test/contracts/dead-letters.test.ts'
const QUEUES = 'test/contracts/queue.test.ts'

export const contractMutants: readonly Mutant[] = [
  {
    id: 'typed-sender-does-not-validate',
    rule: 'T1',
    guarantee: 'data that does not match is refused at the sender, and nothing is sent',
    broken: 'the sender encodes and does not validate',
    edits: [{ file: FORMAT, find: 'if (!this.#schema && (', replace: 'if (payload || (' }],
    files: [SUBJECTS],
    caughtBy: ['T1 what does not match is refused at the sender', 'T1 the sender validates what the bytes say'],
    beside: ['T2 bytes stay bytes'],
  },
  {
    id: 'typed-sender-does-not-decode',
    rule: 'T1',
    guarantee: 'what a codec cannot decode again is refused at the sender',
    broken: 'a codec without a schema is not asked',
    edits: [{ file: FORMAT, find: 'this.#codec === BYTES)', replace: 'this.#codec)' }],
    files: [SUBJECTS],
    caughtBy: ['T1 what a codec encodes and does not decode is refused'],
    beside: ['T2 bytes stay bytes'],
  },
  {
    id: 'typed-sender-transforms',
    rule: 'T2',
    guarantee: 'what is sent is the data as it was given',
    broken: 'what the schema makes of it is sent',
    edits: [
      {
        file: FORMAT,
        find: 'return payload\n    }\n    return reading instanceof',
        replace: 'return encode(verdict.data)\n    }\n    return reading instanceof',
      },
    ],
    files: [SUBJECTS],
    caughtBy: ['T2 the data is sent as it was given'],
    beside: ['T2 bytes stay bytes'],
  },
  {
    id: 'typed-letter-without-a-name',
    rule: 'T3',
    guarantee: 'whoever dies between the letter and the end of the message leaves one letter',
    broken: 'the letter is published without a msgId',
    edits: [{ file: LETTER, find: 'payload, { headers, msgId })', replace: 'payload, msgId ? { headers } : {})' }],
    files: [LETTERS],
    caughtBy: ['T3 who dies between the letter and the end of the message'],
    beside: ['T3 the attempts of a letter are those of the message'],
  },
  {
    id: 'typed-message-not-ended',
    rule: 'T3',
    guarantee: 'a message that does not match is ended for its durable',
    broken: 'the letter is published and the message is left to its ack wait',
    edits: [{ file: STREAM, find: 'await msg.term(', replace: 'await Promise.resolve(' }],
    files: [LETTERS],
    caughtBy: ['T3 what does not match is not yielded, is on the dead-letter subject with the reason, and is ended'],
    beside: ['T3 P7 what was yielded is settled like any message'],
  },
  {
    id: 'typed-letter-of-an-older-delivery',
    rule: 'T3',
    guarantee: 'a message that was handed out again gets no letter from its older holder',
    broken: 'the letter is published before anybody asks whose it is',
    edits: [{ file: STREAM, find: 'await msg.extend()\n', replace: '\n' }],
    files: [LETTERS],
    caughtBy: ['T3 P7 a message that somebody else has by now gets no letter'],
    beside: ['T3 P7 what was yielded is settled like any message'],
  },
  {
    id: 'typed-message-lost-with-its-letter',
    rule: 'T4',
    guarantee: 'a message whose letter cannot be published comes again',
    broken: 'it is ended all the same',
    edits: [
      {
        file: STREAM,
        find: 'await msg.nak(Math.min(LONGEST_PAUSE_MS, retryDelayMs(msg.attempt))).catch(() => {})',
        replace: 'await msg.term(String(Math.min(LONGEST_PAUSE_MS, retryDelayMs(msg.attempt)))).catch(() => {})',
      },
    ],
    files: [LETTERS],
    caughtBy: ['T4 while its letter cannot be published', 'T4 a bus too small for any letter'],
    beside: ['T3 P7 what was yielded is settled like any message'],
  },
  {
    id: 'typed-letters-of-letters',
    rule: 'T5',
    guarantee: 'a dead letter that does not match gets no letter of its own',
    broken: 'it gets one',
    edits: [{ file: LETTER, find: "return subject.endsWith('.dlq') && ", replace: "return subject === '.dlq' && " }],
    files: [LETTERS],
    caughtBy: ['T5 a dead letter gets no letter'],
    beside: ['T3 P7 what was yielded is settled like any message'],
  },
  {
    id: 'typed-letter-not-cut',
    rule: 'T6',
    guarantee: 'a letter that is too large is cut until it fits',
    broken: 'it is tried whole alone',
    edits: [
      { file: LETTER, find: 'if (!tooLarge || n === letters.length - 1) throw error', replace: 'if (!tooLarge || n === 0) throw error' },
    ],
    files: [LETTERS],
    caughtBy: ['T6 headers at their own limit are dropped'],
    beside: ['T3 P7 what was yielded is settled like any message'],
  },
  {
    id: 'typed-job-not-dead',
    rule: 'T7',
    guarantee: 'a job that does not match is dead at once',
    broken: 'it fails like one whose handler threw',
    edits: [
      {
        file: 'src/contracts/queue.ts',
        find: 'await bury(job, reading.reason)\n      // The job is settled',
        replace: '// The job is not settled',
      },
    ],
    files: [QUEUES],
    caughtBy: ['T1 T7 the worker gets what matches'],
    beside: ['T2 T7 a default is the receiver’s'],
  },
  {
    id: 'typed-reply-not-validated',
    rule: 'T8',
    guarantee: 'a reply that does not match is refused by the requester as well',
    broken: 'he gets nothing for it',
    edits: [
      {
        file: 'src/contracts/request.ts',
        find: 'if (reading.matches) return reading.data\n    throw',
        replace: 'if (reading.matches || reply) return reading.matches ? reading.data : undefined\n    throw',
      },
    ],
    files: ['test/contracts/request.test.ts'],
    caughtBy: ['T8 a reply that does not match is refused at the responder'],
    beside: ['T1 T8 what is asked and answered arrives as data'],
  },
  {
    id: 'typed-watch-mistakes-what-is-invalid',
    rule: 'T9',
    guarantee: 'a watch tells what does not match from all else',
    broken: 'it comes as a deletion',
    edits: [
      {
        file: 'src/contracts/bucket.ts',
        find: "return { operation: 'invalid', entry, reason: reading.reason }",
        replace: "return { operation: 'delete', key: entry.key, revision: entry.revision }",
      },
    ],
    files: ['test/contracts/bucket.test.ts'],
    caughtBy: ['T9 a watch yields what does not match as invalid'],
    beside: ['T9 a watch takes a filter and options'],
  },
  {
    id: 'typed-reason-quotes',
    rule: 'T10',
    guarantee: 'a reason holds no value',
    broken: 'it is made of the messages of the validator',
    edits: [
      {
        file: 'src/contracts/reason.ts',
        find: 'explain ? String(explain(issue)) : expectation(issue)',
        replace: 'explain ? String(explain(issue)) : issue.message || expectation(issue)',
      },
    ],
    files: ['test/contracts/reasons.test.ts'],
    caughtBy: ['T10 a reason never repeats a value'],
    beside: ['T10 `explain` says it in the caller’s words'],
  },
]

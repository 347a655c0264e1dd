/** What becomes of a message that was handed out. */

import type { Mutant } from '../mutant.ts'

const SQL = 'sql/migrations/0003_publish_subscribe.sql'
const PUBSUB = 'src/postgres/pubsub.ts'
const STREAM = 'src/runtime/stream.ts'
const POSTGRES = 'test/conformance/postgres.test.ts'
const SETTLING = 'test/postgres/settle-messages.test.ts'
const SETTLING_IN_TX = 'test/postgres/settle-messages-in-transactions.test.ts'

export const deliveryMutants: readonly Mutant[] = [
  {
    id: 'message-ack-unfenced',
    rule: 'P7',
    guarantee: 'once a message has been handed out again, the ack of the older delivery is refused and changes nothing',
    broken: 'an ack does not compare the token',
    edits: [
      {
        file: SQL,
        find: 'and d.seq = any(ack_deliveries.seqs)\n          and d.token = any(ack_deliveries.tokens)\n        returning d.token',
        replace: 'and d.seq = any(ack_deliveries.seqs)\n        returning d.seq',
      },
      {
        file: SQL,
        find: 'from unnest(ack_deliveries.tokens) with ordinality as u(token, n)\n      join gone on gone.token = u.token;',
        replace: 'from unnest(ack_deliveries.seqs) with ordinality as u(seq, n)\n      join gone on gone.seq = u.seq;',
      },
    ],
    files: [SETTLING],
    caughtBy: ['P7 every settlement of the older delivery is refused and changes nothing'],
    beside: ['P7 its ack succeeds and it is never handed out again'],
  },
  {
    id: 'message-settlement-unfenced',
    rule: 'P7',
    guarantee: 'once a message has been handed out again, nak and extend of the older delivery are refused and change nothing',
    broken: 'nak and extend do not compare the token',
    edits: [
      {
        file: SQL,
        find: 'd.seq = g.seq and d.token = g.token\n        for update skip locked',
        replace: 'd.seq = g.seq\n        for update skip locked',
      },
      { file: SQL, find: 'd.seq = g.seq and d.token = g.token\n        for update\n', replace: 'd.seq = g.seq\n        for update\n' },
    ],
    files: [POSTGRES],
    caughtBy: [' of the older delivery is refused and changes nothing'],
    beside: ['P7 expired but not handed out again: ack succeeds'],
  },
  {
    id: 'message-ack-ignores-rival-fetch',
    rule: 'P7',
    guarantee: 'an ack that meets another fetch of its message waits for how that ends',
    broken: 'an ack passes over a row that is locked, as if it were no longer its own',
    edits: [
      {
        file: PUBSUB,
        find: `const done = await this.#settle(ACK, deliveries, ['false'], 'ack')`,
        replace: `const done = await this.#settle(ACK, deliveries, ['true'], 'ack')`,
      },
    ],
    files: [SETTLING],
    caughtBy: ['P7 the same ack succeeds when that fetch is rolled back'],
    beside: ['P7 every settlement of the older delivery is refused and changes nothing'],
  },
  {
    id: 'message-ack-outside-transaction',
    rule: 'P7',
    guarantee: 'ack({ tx }) takes effect with the caller’s transaction',
    broken: 'it is sent on a connection of the bus',
    edits: [
      {
        file: PUBSUB,
        find: `this.#context.db.queryIn(tx, ACK, [...keys([delivery]), String(noWait)], 'ack', expected)`,
        replace: `this.#context.db.query(ACK, [...keys([delivery]), String(noWait)], 'ack')`,
      },
    ],
    files: [SETTLING_IN_TX],
    caughtBy: ['P7 the ack wait ends meanwhile and the transaction rolls back'],
    beside: ['P7 the message was lost before: lease_lost'],
  },
  {
    id: 'message-ack-in-transaction-locks-nothing',
    rule: 'P7',
    guarantee: 'until the transaction of ack({ tx }) ends the message is not handed out again',
    broken: 'the ack in a transaction only looks at the token',
    edits: [
      {
        file: PUBSUB,
        find: `this.#context.db.queryIn(tx, ACK, [...keys([delivery]), String(noWait)], 'ack', expected)`,
        replace: `this.#context.db.queryIn(tx, 'select 1 as n from klieo.deliveries where consumer_id = any($1::text::int[]) and seq = any($2::text::bigint[]) and token = any($3::text::uuid[]) and $4::text is not null', [...keys([delivery]), String(noWait)], 'ack')`,
      },
    ],
    files: [SETTLING_IN_TX],
    caughtBy: ['P7 the ack wait ends meanwhile: nobody gets the message'],
    beside: ['P7 the message was lost before: lease_lost'],
  },
  {
    id: 'lost-answer-is-success',
    rule: 'P7',
    guarantee: 'an ack whose answer was lost is no success when the message was given on meanwhile',
    broken: 'asked again, “not yours any more” is always taken for a first try that arrived',
    edits: [
      {
        file: 'src/runtime/settlement.ts',
        find: `return found === undefined || found === 'gone' || found === leaves`,
        replace: 'return found !== null',
      },
      { file: 'src/runtime/settlement.ts', find: 'if (this.#clock.now() >= this.deadline) return false', replace: '' },
      {
        file: 'src/runtime/settlement.ts',
        find: 'tries === MAX_TRIES || this.#clock.now() >= this.deadline',
        replace: 'tries === MAX_TRIES',
      },
    ],
    files: ['test/postgres/interleavings.test.ts'],
    caughtBy: ['P7 an ack whose answer was lost is no success when the message was given on meanwhile'],
    beside: ['P7 an ack that waits for a redelivery under way is refused'],
  },
  {
    id: 'extend-shortens',
    rule: 'P7',
    guarantee: 'extend restarts the visibility timeout and never shortens it',
    broken: 'the end of the ack wait is set to what the caller says, be it earlier',
    edits: [
      {
        file: SQL,
        find: 'set visible_at = greatest(d.visible_at, clock_timestamp() + make_interval(secs => extend_deliveries.waits_ms[m.n] / 1000.0))',
        replace: 'set visible_at = clock_timestamp() + make_interval(secs => extend_deliveries.waits_ms[m.n] / 1000.0)',
      },
    ],
    files: ['test/postgres/windows.test.ts'],
    caughtBy: ['P7 an extend never shortens an ack wait'],
    beside: ['J6 a heartbeat never shortens a lease'],
  },
  {
    id: 'nak-delay-ignored',
    rule: 'P5',
    guarantee: 'a message naked with a delay comes not before the delay is over',
    broken: 'it comes at once',
    edits: [{ file: SQL, find: 'else nak_deliveries.delays_ms[m.n] / 1000.0 end', replace: 'else 0 end' }],
    files: [POSTGRES],
    caughtBy: ['P5 a nak with a delay is back not before the delay is over', 'P5 new messages flow while a nak waits for its delay'],
    beside: ['P5 a nak brings the message back at once'],
  },
  {
    id: 'ack-wait-ignored',
    rule: 'P5',
    guarantee: 'a message that is not settled within ackWaitMs is delivered again',
    broken: 'only what was naked is delivered again',
    edits: [
      {
        file: SQL,
        find: 'd.visible_at <= v_now and not d.final\n        order by',
        replace: 'd.visible_at <= v_now and not d.final and d.token is null\n        order by',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['P5 a message nobody settled comes again after its ack wait'],
    beside: ['P5 a nak brings the message back at once'],
  },
  {
    id: 'attempt-not-counted',
    rule: 'P5',
    guarantee: 'each delivery has an attempt one higher',
    broken: 'a redelivery has the attempt of the delivery before',
    edits: [{ file: SQL, find: 'set attempt = d.attempt + 1,\n', replace: 'set attempt = d.attempt,\n' }],
    files: [POSTGRES],
    caughtBy: ['P5 attempts count up one by one'],
    beside: ['P8 messages published one after the other come in that order'],
  },
  {
    id: 'redeliveries-last',
    rule: 'P5',
    guarantee: 'redeliveries come before new messages',
    broken: 'a stream yields what it fetched before first, and does not fetch what was naked first',
    edits: [
      {
        file: STREAM,
        find: 'const before = delivery.attempt === 1 ? -1 : this.#buffer.findIndex((other) => other.delivery.attempt === 1)',
        replace: 'const before = -1',
      },
      { file: STREAM, find: 'this.#redelivering = true\n      this.#redeliveries++', replace: 'this.#redeliveries++' },
    ],
    files: [POSTGRES],
    caughtBy: ['P5 a naked message comes before what its stream has fetched and not yielded'],
    beside: ['P5 a nak brings the message back at once'],
  },
  {
    id: 'max-deliver-off-by-one',
    rule: 'P6',
    guarantee: 'the maxDeliver-th delivery left unsettled ends the message',
    broken: 'there is one delivery more',
    edits: [
      {
        file: SQL,
        find: 'final = coalesce(d.attempt + 1 >= fetch_messages.max_deliver, false)',
        replace: 'final = coalesce(d.attempt + 1 > fetch_messages.max_deliver, false)',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['P6 a nak of the last delivery ends the message, too'],
    beside: ['P6 term is no dead letter'],
  },
  {
    id: 'max-deliver-ignored',
    rule: 'P6',
    guarantee: 'the maxDeliver-th delivery left unsettled ends the message and publishes it on the dead-letter subject',
    broken: 'the statement is told that there is no limit',
    edits: [
      {
        file: PUBSUB,
        find: '[id, limit, ackWaitMs, maxAckPending, maxDeliver, MAX_FETCH_BYTES]',
        replace: '[id, limit, ackWaitMs, maxAckPending, null, MAX_FETCH_BYTES]',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['P6 a dead letter concerns one durable alone'],
    beside: ['P6 term is no dead letter'],
  },
  {
    id: 'message-buried-twice',
    rule: 'P6',
    guarantee: 'a message ends in exactly one dead letter, however many reapers and members there are',
    broken: 'a letter is written for each message that was found, whether or not it was still there to be deleted',
    edits: [
      { file: SQL, find: 'limit bury_deliveries.max_messages\n    for update skip locked', replace: 'limit bury_deliveries.max_messages' },
      {
        file: SQL,
        find: 'select d.seq\n    from klieo.deliveries d\n    where d.consumer_id + 0 = bury_deliveries.consumer and',
        replace:
          'select d.consumer_id, d.tx, d.seq, d.attempt\n    from klieo.deliveries d\n    where d.consumer_id + 0 = bury_deliveries.consumer and',
      },
      {
        file: SQL,
        find: 'from gone\n    cross join lateral (select * from klieo.messages m where m.tx = gone.tx',
        replace: 'from ended gone\n    cross join lateral (select * from klieo.messages m where m.tx = gone.tx',
      },
    ],
    files: ['test/postgres/reaper.test.ts'],
    caughtBy: ['P6 two reapers and a member at once bury each exactly once'],
    beside: ['P6 with no reaper a member that fetches buries them'],
  },
  {
    id: 'message-letter-apart',
    rule: 'P6',
    guarantee: 'a message ends and its dead letter is published in one transaction',
    broken: 'first the delivery is forgotten, then the letter is published',
    edits: [
      {
        file: PUBSUB,
        find: `const [row] = await this.#context.db.query<{ count: number }>(BURY, [consumer, BURY_BATCH], 'dead-letter')`,
        replace: `const gone = await this.#context.db.query<{ subject: string; payload: Uint8Array; headers: string }>(\`
      with gone as (
        delete from klieo.deliveries where consumer_id = $1 and final and visible_at <= clock_timestamp() and $2 > 0 returning consumer_id, tx, seq, attempt
      )
      select o.durable || '.dlq' as subject, m.payload, (m.headers || jsonb_build_object('dlq_reason', 'max_deliver_exceeded', 'dlq_subject', m.subject, 'dlq_seq', m.seq::text, 'dlq_attempts', gone.attempt::text))::text as headers
      from gone join klieo.messages m on m.tx = gone.tx and m.seq = gone.seq join klieo.consumer_offsets o on o.id = gone.consumer_id\`, [consumer, BURY_BATCH], 'dead-letter')
    for (const { subject, payload, headers } of gone) {
      await this.#context.db.query('insert into klieo.messages (subject, payload, headers) values ($1, $2, $3::jsonb)', [subject, Buffer.from(payload), headers], 'dead-letter')
    }
    const row = { count: gone.length }`,
      },
    ],
    files: ['test/postgres/letters.test.ts'],
    caughtBy: ['P6 a dead letter that cannot be stored'],
    beside: ['J4 a dead letter that cannot be stored leaves a job at deadLetter'],
  },
  {
    id: 'close-counts-attempt',
    rule: 'P10',
    guarantee: 'a closing stream hands back what it did not yield without counting the attempt',
    broken: 'the attempt is counted',
    edits: [{ file: SQL, find: 'set attempt = d.attempt - 1, token = null', replace: 'set token = null' }],
    files: [POSTGRES],
    caughtBy: ['P10 closing hands back what was not yielded'],
    beside: ['P10 a stream can be disposed of'],
  },
  {
    id: 'close-keeps-prefetched',
    rule: 'P10',
    guarantee: 'a closing stream hands back at once what it did not yield',
    broken: 'what was fetched waits for the end of its ack wait',
    edits: [{ file: STREAM, find: 'await this.#release(this.#buffer.splice(0))', replace: 'this.#buffer.splice(0)' }],
    files: [SETTLING],
    caughtBy: ['P10 fifty prefetched messages are with the other member at once'],
    beside: ['P6 of the last delivery: the dead letter is there at once'],
  },
  {
    id: 'close-forgets-yielded',
    rule: 'P10',
    guarantee: 'closing the bus hands back what was yielded and not settled',
    broken: 'it waits for the end of its ack wait',
    edits: [
      {
        file: PUBSUB,
        find: 'map((stream) => stream.handBack())',
        replace: 'map((stream) => stream.close())',
      },
    ],
    files: [SETTLING],
    caughtBy: ['P10 when the bus closes, what it yielded is with the other member at once too'],
    beside: ['P6 of the last delivery: the dead letter is there at once'],
  },
  {
    id: 'expired-yet-yielded',
    rule: 'P10',
    guarantee: 'what ran out before it was yielded is dropped, not yielded',
    broken: 'a stream yields whatever it has fetched, however long ago',
    edits: [
      { file: STREAM, find: 'if (this.#options.clock.now() < held.deadline) return held', replace: 'return held' },
      { file: STREAM, find: 'this.#watchStale()\n  }\n\n  /** What nobody asks for', replace: '}\n\n  /** What nobody asks for' },
    ],
    files: ['test/postgres/workers-killed.test.ts', POSTGRES],
    caughtBy: [
      'P7 and P10 a member: what it held and what it had fetched go to the others',
      'P10 what ran out before it was yielded is dropped',
    ],
    beside: ['P10 a stream can be disposed of'],
  },
  {
    id: 'max-ack-pending-ignored',
    rule: 'P3',
    guarantee: 'no more than maxAckPending messages of a durable are handed out and unsettled',
    broken: 'the statement is told a larger number',
    edits: [
      {
        file: PUBSUB,
        find: '[id, limit, ackWaitMs, maxAckPending, maxDeliver, MAX_FETCH_BYTES]',
        replace: '[id, limit, ackWaitMs, maxAckPending + 1_000, maxDeliver, MAX_FETCH_BYTES]',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['P3 maxAckPending bounds what the durable has handed out'],
    beside: ['P3 maxInFlight bounds what a stream has handed out'],
  },
  {
    id: 'filter-replaced',
    rule: 'P11',
    guarantee: 'subscribing to a durable with another filter is a conflict',
    broken: 'whoever subscribes joins, whatever the filter',
    edits: [{ file: PUBSUB, find: 'if (found?.filter === filter) return {', replace: 'if (found) return {' }],
    files: [POSTGRES],
    caughtBy: ['P11 a subscription with another filter is refused'],
    beside: ['P11 a subscription with the same filter joins the durable'],
  },
]

import { describe, expect, test } from 'vitest'
import { caught, Invented } from './invented.ts'

/** A durable and a message that it was given and acked. */
function acked(record: Invented): void {
  record.durable('d', 'shop.>')
  record.published(1, 'm1', 0, 1)
  record.delivered(1, 'm1', 1, 10)
  record.settle('ack', 1, 1, 11, 12)
}

describe('messages are stored', () => {
  caught('P1 an acknowledged message that is not stored', 'publish: acknowledged, stored', (record, breaks) => {
    record.publish('m1', 0, 1, { ok: { seq: 1, duplicate: false } })
    if (!breaks) record.stored(1, 'm1')
  })

  caught('P1 one that is stored with another seq', 'publish: acknowledged, stored', (record, breaks) => {
    record.publish('m1', 0, 1, { ok: { seq: 1, duplicate: false } })
    record.stored(breaks ? 2 : 1, 'm1')
  })

  caught('P1 one that is stored twice', 'publish: stored once', (record, breaks) => {
    record.published(1, 'm1', 0, 1)
    if (breaks) record.stored(2, 'm1')
    else record.published(2, 'm2', 2, 3)
  })

  caught('P1 one of unknown fate that is stored twice', 'publish: stored once', (record, breaks) => {
    record.publish('m1', 0, 1, { err: 'connection' })
    record.stored(1, 'm1')
    if (breaks) record.stored(2, 'm1')
  })

  caught('P1 one that nobody published', 'publish: nothing from nowhere', (record, breaks) => {
    record.published(1, 'm1', 0, 1)
    if (breaks) record.stored(2, 'm2')
    else record.stored(2, null, 'probe')
  })

  caught('P1 one whose transaction rolled back', 'publish: rolled back, not stored', (record, breaks) => {
    record.publish('m1', 0, 1, { ok: { seq: 1, duplicate: false } }, { tx: 't' })
    record.call({ do: breaks ? 'rollback' : 'commit', tx: 't' }, 2, 3)
    record.stored(1, 'm1')
  })

  caught('P1 one whose transaction nobody committed', 'publish: rolled back, not stored', (record, breaks) => {
    record.publish('m1', 0, 1, { ok: { seq: 1, duplicate: false } }, { tx: 't' })
    if (!breaks) record.call({ do: 'commit', tx: 't' }, 2, 3, { err: 'sql:57P01' })
    record.stored(1, 'm1')
  })

  caught('P1 one whose savepoint was rolled back', 'publish: rolled back, not stored', (record, breaks) => {
    record.publish('m1', 0, 1, { ok: { seq: 1, duplicate: false } }, { tx: 't/s1' })
    record.call({ do: 'rollback', tx: breaks ? 't/s1' : 't/s2' }, 2, 3)
    record.call({ do: 'commit', tx: 't' }, 4, 5)
    record.stored(1, 'm1')
  })

  caught('P1 one that was refused', 'publish: rolled back, not stored', (record, breaks) => {
    record.publish('m1', 0, 1, { err: breaks ? 'invalid_argument' : 'unavailable' })
    record.stored(1, 'm1')
  })

  caught('P1 half a transaction whose commit nobody answered', 'publish: acknowledged, stored', (record, breaks) => {
    record.publish('m1', 0, 1, { ok: { seq: 1, duplicate: false } }, { tx: 't' })
    record.publish('m2', 2, 3, { ok: { seq: 2, duplicate: false } }, { tx: 't' })
    record.call({ do: 'commit', tx: 't' }, 4, 5, { err: 'sql:Connection terminated unexpectedly' })
    record.stored(1, 'm1')
    if (!breaks) record.stored(2, 'm2')
  })

  caught('P1 the other half', 'publish: rolled back, not stored', (record, breaks) => {
    record.publish('m1', 0, 1, { ok: { seq: 1, duplicate: false } }, { tx: 't' })
    record.publish('m2', 2, 3, { ok: { seq: 2, duplicate: false } }, { tx: 't' })
    record.call({ do: 'commit', tx: 't' }, 4, 5, { err: 'sql:Connection terminated unexpectedly' })
    if (breaks) record.stored(2, 'm2')
  })

  caught(
    'P1 a message that is there while a job of its transaction is not, or the other way round',
    'jobs: nothing lost',
    (record, breaks) => {
      record.publish('m1', 0, 1, { ok: { seq: 1, duplicate: false } }, { tx: 't' })
      record.enqueued('7', 'j1', 2, 3, { tx: 't' })
      record.call({ do: 'commit', tx: 't' }, 4, 5, { err: 'sql:08006' })
      if (breaks) record.stored(1, 'm1')
    },
  )

  caught('P1 a prepared transaction that another process committed', 'publish: acknowledged, stored', (record, breaks) => {
    record.publish('m1', 0, 1, { ok: { seq: 1, duplicate: false } }, { tx: 't' })
    record.call({ do: 'commit', tx: 't' }, 4, 5, { err: 'sql:08006' })
    record.call({ do: 'commit', tx: 't' }, 6, 7, breaks ? { ok: true } : { err: 'sql:42704' }, 'b')
  })

  caught('P12 two messages with one msgId', 'publish: one message a msgId', (record, breaks) => {
    record.published(1, 'm1', 0, 1, { msgId: 'x' })
    record.published(2, 'm2', 10, breaks ? 100_000 : 130_000, { msgId: 'x' })
  })

  caught('P12 a duplicate that was answered a seq that is not the first one’s', 'publish: one message a msgId', (record, breaks) => {
    record.published(1, 'm1', 0, 1, { msgId: 'x' })
    record.published(2, 'm2', 0, 1)
    record.publish('m3', 10, 11, { ok: { seq: breaks ? 2 : 1, duplicate: true } }, { msgId: 'x' })
  })

  caught('P12 a duplicate that is stored', 'publish: duplicates store nothing', (record, breaks) => {
    record.publish('m1', 0, 1, { err: 'connection' }, { msgId: 'x' })
    record.publish('m2', 200_000, 200_001, { ok: { seq: 1, duplicate: true } }, { msgId: 'x' })
    record.stored(1, breaks ? 'm2' : 'm1')
  })
})

describe('messages come to an end', () => {
  caught('P3 a message that was never delivered', 'messages: nothing lost', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.published(1, 'm1', 0, 1, { subject: breaks ? 'shop.a' : 'other' })
  })

  caught('P3 one that one of two durables never had', 'messages: nothing lost', (record, breaks) => {
    acked(record)
    record.durable('e', breaks ? 'shop.*' : 'shop')
  })

  caught('P5 one that was delivered and is gone unsettled', 'messages: nothing lost', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.published(1, 'm1', 0, 1)
    record.delivered(1, 'm1', 1, 10)
    record.settle('ack', 1, 1, 11, 40, breaks ? { err: 'not_found' } : { err: 'connection' })
  })

  caught('P7 one that a quick lease_lost is all that ended', 'messages: nothing lost', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.published(1, 'm1', 0, 1)
    record.delivered(1, 'm1', 1, 10)
    record.settle('ack', 1, 1, 11, breaks ? 12 : 112, { err: 'lease_lost' })
  })

  caught('P7 an ack whose transaction rolled back and that ended it', 'messages: nothing lost', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.published(1, 'm1', 0, 1)
    record.delivered(1, 'm1', 1, 10)
    record.settle('ack', 1, 1, 11, 12, { ok: true }, { tx: 't' })
    record.call({ do: breaks ? 'rollback' : 'commit', tx: 't' }, 13, 14)
  })

  caught('P3 what is left over after the end', 'messages: drained', (record, breaks) => {
    record.durable('d', 'shop.>', null, breaks ? [1] : [])
    record.published(1, 'm1', 0, 1)
    record.delivered(1, 'm1', 1, 10)
    if (!breaks) record.settle('term', 1, 1, 11, 12)
  })

  test('P7 what was settled and is left over breaks two rules', async () => {
    const record = new Invented()
    acked(record)
    record.final.durables = [{ name: 'd', filter: 'shop.>', maxDeliver: null, unsettled: [1] }]
    const { broken } = await record.check()
    expect(Object.keys(broken).sort()).toEqual(['messages: drained', 'messages: settled, gone'])
  })

  const HEADERS = { dlq_reason: 'max_deliver_exceeded', dlq_subject: 'shop.a', dlq_seq: '1', dlq_attempts: '2' }
  function twice(record: Invented): void {
    record.durable('d', 'shop.>', 2)
    record.published(1, 'm1', 0, 1)
    record.delivered(1, 'm1', 1, 10)
    record.settle('nak', 1, 1, 11, 12)
    record.delivered(1, 'm1', 2, 20)
  }

  caught('P6 a message that reached maxDeliver and was not buried', 'messages: nothing lost', (record, breaks) => {
    twice(record)
    if (!breaks) record.stored(2, 'm1', 'd.dlq', HEADERS)
  })

  caught('P6 one that was buried twice', 'messages: dead letters', (record, breaks) => {
    twice(record)
    record.stored(2, 'm1', 'd.dlq', HEADERS)
    if (breaks) record.stored(3, 'm1', 'd.dlq', HEADERS)
    else record.stored(3, 'm1', 'other.dlq', HEADERS)
  })

  caught('P6 one that was settled by its last delivery and buried', 'messages: settled, not buried', (record, breaks) => {
    twice(record)
    record.settle('ack', 1, 2, 21, 60, breaks ? { ok: true } : { err: 'lease_lost' })
    record.stored(2, 'm1', 'd.dlq', HEADERS)
  })

  for (const [what, headers] of Object.entries({
    'too early': { dlq_attempts: '1' },
    'from another subject': { dlq_subject: 'shop.b' },
    'for another reason': { dlq_reason: 'tired' },
  })) {
    caught(`P6 one that was buried ${what}`, 'messages: dead letters', (record, breaks) => {
      twice(record)
      record.stored(2, 'm1', 'd.dlq', breaks ? { ...HEADERS, ...headers } : HEADERS)
    })
  }

  caught('P6 a dead letter without a limit', 'messages: dead letters', (record, breaks) => {
    twice(record)
    if (breaks) record.final.durables = [{ name: 'd', filter: 'shop.>', maxDeliver: null, unsettled: [] }]
    record.stored(2, 'm1', 'd.dlq', HEADERS)
  })

  caught('P6 a dead letter with another payload', 'messages: dead letters', (record, breaks) => {
    twice(record)
    record.stored(2, breaks ? 'm2' : 'm1', 'd.dlq', HEADERS)
  })

  caught('P6 a dead letter of a message that the durable never had', 'messages: dead letters', (record, breaks) => {
    acked(record)
    record.published(2, 'm2', 0, 1, { subject: breaks ? 'other' : 'shop.b' })
    record.final.durables = [{ name: 'd', filter: 'shop.>', maxDeliver: 2, unsettled: [] }]
    record.stored(3, 'm2', 'd.dlq', { ...HEADERS, dlq_seq: '2', dlq_subject: breaks ? 'other' : 'shop.b' })
  })
})

describe('deliveries', () => {
  caught('P1 a delivery of what was rolled back', 'deliveries: of what was published', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.publish('m1', 0, 1, { ok: { seq: 1, duplicate: false } }, { tx: 't' })
    record.call({ do: breaks ? 'rollback' : 'commit', tx: 't' }, 2, 3)
    if (!breaks) record.stored(1, 'm1')
    record.delivered(1, 'm1', 1, 10)
    record.settle('ack', 1, 1, 11, 12)
  })

  caught('P2 a delivery that the filter does not take', 'deliveries: of what was published', (record, breaks) => {
    acked(record)
    record.published(2, 'm2', 0, 1, { subject: breaks ? 'other' : 'shop.b' })
    record.delivered(2, 'm2', 1, 10, { subject: breaks ? 'other' : 'shop.b' })
    record.settle('ack', 2, 1, 11, 12)
  })

  caught('P10 an attempt that was yielded twice', 'deliveries: an attempt once', (record, breaks) => {
    acked(record)
    record.final.durables = [{ name: 'd', filter: 'shop.>', maxDeliver: null, unsettled: [] }]
    record.published(2, 'm2', 0, 1)
    record.delivered(2, 'm2', 1, 10)
    record.delivered(2, 'm2', breaks ? 1 : 2, 2_000)
    record.settle('ack', 2, breaks ? 1 : 2, 2_001, 2_002)
  })

  caught('P6 more deliveries than maxDeliver', 'deliveries: maxDeliver', (record, breaks) => {
    record.durable('d', 'shop.>', breaks ? 1 : 2)
    record.published(1, 'm1', 0, 1)
    record.delivered(1, 'm1', 1, 10)
    record.delivered(1, 'm1', 2, 2_000)
    record.settle('ack', 1, 2, 2_001, 2_002)
  })

  caught('P7 a delivery after an ack', 'deliveries: settled, never again', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.published(1, 'm1', 0, 1)
    record.delivered(1, 'm1', 1, 10)
    record.settle('ack', 1, 1, 11, 40, breaks ? { ok: true } : { err: 'connection' })
    record.delivered(1, 'm1', 2, 2_000)
    record.settle('ack', 1, 2, 2_001, 2_040, { err: 'closed' })
  })

  caught('P7 a delivery after an ack in a transaction that committed', 'deliveries: settled, never again', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.published(1, 'm1', 0, 1)
    record.delivered(1, 'm1', 1, 10)
    record.settle('ack', 1, 1, 11, 12, { ok: true }, { tx: 't' })
    record.call({ do: breaks ? 'commit' : 'rollback', tx: 't' }, 13, 14)
    record.delivered(1, 'm1', 2, 2_000)
    record.settle('ack', 1, 2, 2_001, 2_040, { err: 'closed' })
  })

  caught('P7 a delivery that was settled twice', 'deliveries: settled once', (record, breaks) => {
    acked(record)
    record.settle('nak', 1, 1, 13, 14, breaks ? { ok: true } : { err: 'already_settled' })
  })

  caught(
    'P7 an extend of a delivery that had been handed out again',
    ['deliveries: fencing', 'deliveries: not before the ack wait is over'],
    (record, breaks) => {
      record.durable('d', 'shop.>')
      record.published(1, 'm1', 0, 1)
      record.delivered(1, 'm1', 1, 10)
      record.delivered(1, 'm1', 2, 1_100)
      record.settle('extend', 1, 1, 1_200, 1_201, breaks ? { ok: true } : { err: 'lease_lost' })
      record.settle('ack', 1, 2, 2_300, 2_301)
    },
  )
})

describe('redeliveries come in time', () => {
  caught('P5 a redelivery before an extended ack wait is over', 'deliveries: not before the ack wait is over', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.published(1, 'm1', 0, 1)
    record.delivered(1, 'm1', 1, 10)
    record.settle('extend', 1, 1, 800, 801, breaks ? { ok: true } : { err: 'connection' })
    record.delivered(1, 'm1', 2, 1_500)
    record.settle('ack', 1, 2, 1_501, 1_502)
  })

  caught(
    'P5 a redelivery before the ack wait counted from the publish is over',
    'deliveries: not before the ack wait is over',
    (record, breaks) => {
      record.durable('d', 'shop.>')
      record.published(1, 'm1', 0, 1)
      record.delivered(1, 'm1', 1, 10)
      record.delivered(1, 'm1', 2, breaks ? 900 : 960)
      record.settle('ack', 1, 2, 961, 962)
    },
  )

  caught('P5 … from when a stream that holds one message asked for it', 'deliveries: not before the ack wait is over', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.published(1, 'm1', 0, 1)
    record.delivered(1, 'm1', 1, 5_000, breaks ? { handedOutAfter: 4_900_000 } : {})
    record.delivered(1, 'm1', 2, 5_500)
    record.settle('ack', 1, 2, 5_501, 5_502)
  })

  caught(
    'P10 a redelivery before the ack wait is over, though its holder was stopped at times',
    'deliveries: not before the ack wait is over',
    (record, breaks) => {
      record.durable('d', 'shop.>')
      record.published(1, 'm1', 0, 1)
      // Stopped between the stream's look at the clock, at 950 at the latest, and the note of what it yielded.
      record.fault('stop', 'a', 950)
      record.fault('continue', 'a', breaks ? 2_000 : 2_795)
      record.delivered(1, 'm1', 1, 2_800)
      record.delivered(1, 'm1', 2, 2_500, {}, 'b')
      record.settle('ack', 1, 2, 2_501, 2_502)
    },
  )

  caught('P5 … from the commit of its transaction', 'deliveries: not before the ack wait is over', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.published(1, 'm1', 0, 1, { tx: 't' })
    record.call({ do: 'commit', tx: 't' }, breaks ? 500 : 50, 501)
    record.delivered(1, 'm1', 1, 510)
    record.delivered(1, 'm1', 2, 1_200)
    record.settle('ack', 1, 2, 1_201, 1_202)
  })

  caught('P5 … from when the delivery before was free', 'deliveries: not before the ack wait is over', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.published(1, 'm1', 0, 1)
    record.delivered(1, 'm1', 1, 10)
    if (!breaks) record.settle('nak', 1, 1, 11, 12)
    record.delivered(1, 'm1', 2, 1_005)
    record.delivered(1, 'm1', 3, 1_500)
    record.settle('ack', 1, 3, 1_501, 1_502)
  })

  caught('P5 a redelivery before the delay of a nak is over', 'deliveries: not before the ack wait is over', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.published(1, 'm1', 0, 1)
    record.delivered(1, 'm1', 1, 10)
    record.settle('nak', 1, 1, 11, 12, { ok: true }, { delayMs: breaks ? 700 : 500 })
    record.delivered(1, 'm1', 2, 600)
    record.settle('ack', 1, 2, 601, 602)
  })

  caught(
    'P10 a redelivery before the ack wait is over whose holder lived on',
    'deliveries: not before the ack wait is over',
    (record, breaks) => {
      record.durable('d', 'shop.>')
      record.published(1, 'm1', 0, 1)
      record.delivered(1, 'm1', 1, 10)
      // Closing a stream does not give back what it yielded; closing its bus does.
      record.call({ do: 'close', member: 'a', ...(breaks ? { stream: 's1' } : {}) }, 20, 21)
      record.delivered(1, 'm1', 2, 30, {}, 'b')
      record.settle('ack', 1, 2, 31, 32)
    },
  )

  caught(
    'P7 an extend while an ack in a transaction holds the message extends nothing',
    'deliveries: not before the ack wait is over',
    (record, breaks) => {
      record.durable('d', 'shop.>')
      record.published(1, 'm1', 0, 1)
      record.delivered(1, 'm1', 1, 10)
      if (!breaks) record.settle('ack', 1, 1, 700, 701, { ok: true }, { tx: 't' })
      record.settle('extend', 1, 1, 800, 801)
      record.call({ do: 'rollback', tx: 't' }, 900, 901)
      record.delivered(1, 'm1', 2, 1_100)
      record.settle('ack', 1, 2, 1_101, 1_102)
    },
  )

  caught(
    'P7 an extend that meets an ack in a transaction on its way extends nothing',
    'deliveries: not before the ack wait is over',
    (record, breaks) => {
      record.durable('d', 'shop.>')
      record.published(1, 'm1', 0, 1)
      record.delivered(1, 'm1', 1, 10)
      record.settle('extend', 1, 1, 700, breaks ? 749 : 800)
      record.settle('ack', 1, 1, 750, 751, { ok: true }, { tx: 't' })
      record.call({ do: 'rollback', tx: 't' }, 900, 901)
      record.delivered(1, 'm1', 2, 1_100)
      record.settle('ack', 1, 2, 1_101, 1_102)
    },
  )
})

describe('order', () => {
  function three(record: Invented, order: readonly number[], at: number, gap = 1): void {
    record.durable('d', 'shop.>')
    record.solo.push('d')
    for (const n of [1, 2, 3]) record.published(n, `m${n}`, n * 10, n * 10 + 1, { order: n, after: n - 1 })
    for (const [n, seq] of order.entries()) record.delivered(seq, `m${seq}`, 1, at + n * gap)
    for (const seq of order) record.settle('ack', seq, 1, at + 5_000, at + 5_001)
  }

  caught('P8 two messages of one publisher in the wrong order', 'deliveries: in order', (record, breaks) =>
    three(record, breaks ? [1, 3, 2] : [1, 2, 3], 100),
  )

  caught('P8 the same, where what was late may have been handed back', 'deliveries: in order', (record, breaks) =>
    three(record, [2, 1, 3], breaks ? 300 : 600),
  )

  caught('P8 the same, while a stream of it closed', 'deliveries: in order', (record, breaks) => {
    three(record, [2, 1, 3], 100)
    if (!breaks) record.call({ do: 'close', member: 'b', stream: 's0' }, 50, 51, { ok: true }, 'b')
  })

  caught('P8 the same, of concurrent publishes', 'deliveries: in order', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.solo.push('d')
    record.published(1, 'm1', 0, 5, { order: 1, after: 0 })
    record.published(2, 'm2', 3, 6, { order: 2, after: breaks ? 1 : 0 })
    for (const seq of [2, 1]) record.delivered(seq, `m${seq}`, 1, 22 - seq)
    for (const seq of [2, 1]) record.settle('ack', seq, 1, 30, 31)
  })

  caught('P8 the same, in one transaction', 'deliveries: in order', (record, breaks) => {
    record.durable('d', 'shop.>')
    record.solo.push('d')
    record.published(1, 'm1', 0, 1, { order: 1, tx: 't' })
    record.published(2, 'm2', 2, 3, { order: 2, tx: 't/s' })
    record.call({ do: 'commit', tx: 't' }, 4, 5)
    for (const seq of breaks ? [2, 1] : [1, 2]) record.delivered(seq, `m${seq}`, 1, 20)
    for (const seq of [1, 2]) record.settle('ack', seq, 1, 30, 31)
  })
})

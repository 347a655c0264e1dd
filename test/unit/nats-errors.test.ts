import { JetStreamApiError } from '@nats-io/jetstream'
import { expect, test } from 'vitest'
import { natsError } from '../../src/nats/errors.ts'

test('a message whose first copy is being stored may be published again', () => {
  // As in errors.json of nats-server 2.12.
  const underWay = new JetStreamApiError({ code: 409, err_code: 10_158, description: 'duplicate message id is in process' })
  expect(natsError(underWay)).toMatchObject({ code: 'unavailable', retryable: true })
})

import type { Scenario } from '../scenario.ts'
import { connections } from './connections.ts'
import { durables } from './durables.ts'
import { inFlight } from './in-flight.ts'
import { messages } from './messages.ts'
import { payloads } from './payloads.ts'
import { queues } from './queues.ts'
import { slowConsumers } from './slow-consumers.ts'

export const scenarios: readonly Scenario[] = [connections, queues, durables, messages, payloads, slowConsumers, inFlight]

/** `klieo-bus/memory`: the bus in one process. */

export type { Clock } from '../runtime/clock.ts'
export { MemoryBus, type MemoryBusOptions } from './bus.ts'
export type { DeadJob } from './job-table.ts'
export { MemoryStore } from './store.ts'
export { VirtualClock } from './virtual-clock.ts'

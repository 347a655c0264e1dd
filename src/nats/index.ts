/** `klieo-bus/nats`: the bus on NATS JetStream. */

export { NatsBus, type NatsBusOptions } from './bus.ts'

export { Bridge, type BridgedBus, type BridgeOptions, type BridgeStats, type BridgeStopOptions } from './bridge.ts'

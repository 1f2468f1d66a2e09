/** What WebGPU needs: whether there is a GPU, a model's nodes as it takes them, and word when the GPU goes. */
import { concat, varint } from "./packs.js";

const GRAPH = 7; // of a model, in onnx.proto
const NODE = 1; // of a graph

/** `{ software, half }` of this browser's GPU; undefined if it gives us none. */
export async function findGpu() {
  const adapter = await globalThis.navigator?.gpu?.requestAdapter().catch(() => null);
  if (!adapter) return undefined;
  return { software: Boolean(adapter.info?.isFallbackAdapter), half: adapter.features.has("shader-f16") };
}

/** A model file with other nodes: its own are left out, and the others follow, as protobuf merges what follows. */
export function withNodes(model, nodes) {
  const kept = [];
  for (const field of fieldsOf(model)) {
    if (field.number !== GRAPH) {
      kept.push(model.subarray(field.start, field.end));
      continue;
    }
    const graph = model.subarray(field.value, field.end);
    const parts = fieldsOf(graph).filter(({ number }) => number !== NODE).map(({ start, end }) => graph.subarray(start, end));
    const size = parts.reduce((sum, part) => sum + part.length, 0);
    kept.push(Uint8Array.of((GRAPH << 3) | 2), varint(size), ...parts);
  }
  return concat([...kept, nodes]);
}

/** The fields of a message: the tag at `start`, its content from `value` to `end`. */
function fieldsOf(message) {
  const fields = [];
  let at = 0;
  const number = () => {
    for (let value = 0, weight = 1; ; weight *= 128) {
      const byte = message[at++];
      value += (byte & 0x7f) * weight;
      if (!(byte & 0x80)) return value;
    }
  };
  while (at < message.length) {
    const start = at;
    const tag = number();
    let size = { 1: 8, 5: 4 }[tag & 7] ?? 0;
    if ((tag & 7) === 2) size = number();
    else if ((tag & 7) === 0) number();
    fields.push({ number: tag >>> 3, start, value: at, end: (at += size) });
  }
  return fields;
}

/** A promise that rejects with why, once the GPU is gone; it never resolves. */
export async function lossOf(ort) {
  const { reason, message } = await (await ort.env.webgpu.device).lost;
  throw new Error(message || reason);
}

// Runs models with onnxruntime-node: node run.mjs PACKAGES FOLDER. PACKAGES is where npm has installed it; FOLDER holds
// request.json and every array as raw little-endian values. Writes one file of float32 values for each model there.
//
// request.json: [{model, result, rowsPerCall, inputs: {name: {type, dims, file}}}, ...]; the inputs are cut along their
// first axis into calls of so many rows, those without an axis go into every call.

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [packages, folder] = process.argv.slice(2);
const ort = createRequire(join(packages, "here.js"))("onnxruntime-node");

const ARRAYS = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array };

function load(folder, { type, dims, file }) {
  const bytes = new Uint8Array(readFileSync(join(folder, file))); // a copy, which begins at a multiple of eight
  return { type, dims, values: new ARRAYS[type](bytes.buffer) };
}

function rows({ type, dims, values }, from, to) {
  if (dims.length === 0) return new ort.Tensor(type, values, dims);
  const size = values.length / dims[0];
  return new ort.Tensor(type, values.slice(from * size, to * size), [to - from, ...dims.slice(1)]);
}

for (const { model, result, rowsPerCall, inputs } of JSON.parse(readFileSync(join(folder, "request.json"), "utf8"))) {
  const session = await ort.InferenceSession.create(model, { intraOpNumThreads: 1 });
  const loaded = Object.entries(inputs).map(([name, input]) => [name, load(folder, input)]);
  const count = loaded.find(([, input]) => input.dims.length > 0)[1].dims[0];
  const parts = [];
  for (let from = 0; from < count; from += rowsPerCall) {
    const to = Math.min(from + rowsPerCall, count);
    const feeds = Object.fromEntries(loaded.map(([name, input]) => [name, rows(input, from, to)]));
    const { data } = (await session.run(feeds))[session.outputNames[0]];
    parts.push(Buffer.from(data.buffer, data.byteOffset, data.byteLength));
  }
  writeFileSync(join(folder, result), Buffer.concat(parts));
}

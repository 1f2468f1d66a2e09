/**
 * Pictures from a kind-edge bundle, in a browser (onnxruntime-web) or in Node (onnxruntime-node).
 *
 *     import { load } from "./kind-edge.js";
 *     const model = await load(".");
 *     const [picture] = await model.generate("sneaker", { seed: 7 });
 *
 * The same seed gives the same picture as in Python: docs/noise.md specifies the noise, manifest.json the sampler.
 */

import { gaussianNoise } from "./noise.js";
import { joinFile, readPack, sha256, takeApart } from "./packs.js";
import { findGpu, lossOf, withNodes } from "./webgpu.js";

export { gaussianNoise };

const IN_NODE = typeof process !== "undefined" && Boolean(process.versions?.node);
const MAX_THREADS = 4; // beyond that phones slow down: the rest are small cores
const ARRAYS = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array };

export class KindEdgeError extends Error {
  name = "KindEdgeError";
}

/**
 * Open a folder that holds `manifest.json`: a bundle, or its `web` folder. See kind-edge.d.ts for the options.
 * Every model file is compared with the manifest's hash before it is run.
 */
export async function load(folder = ".", options = {}) {
  const given = parseManifest(await readFile(folder, "manifest.json", options));
  const packs = await readPacks(folder, given, options);
  const manifest = withClasses(given, packs);
  const entry = chooseModel(manifest, options.model);
  const backend = options.backend ?? "cpu";
  const threads = options.threads ?? manifest.threads;
  if (backend === "gpu") await checkGpu(entry);
  const ort = options.ort ?? (await importRuntime(folder, backend, threads));
  const decoder = chooseDecoder(manifest, entry);
  const sessions = [];
  for (const each of [entry, decoder].filter(Boolean)) {
    const bytes = await readModel(folder, given, each.path, options);
    const joined = each === entry && packs.length ? await addClasses(folder, given, each.path, bytes, packs, options) : bytes;
    const nodes = backend === "gpu" && each.webgpu ? await readModel(folder, given, each.webgpu, options) : undefined;
    const model = nodes ? withNodes(joined, nodes) : joined;
    sessions.push(await openSession(ort, model, each.path, backend, threads));
  }
  return new Model(manifest, entry, ort, sessions, backend);
}

class Model {
  #manifest;
  #entry;
  #ort;
  #session;
  #decoder;
  #gone; // rejects once the GPU is gone

  constructor(manifest, entry, ort, [session, decoder], backend) {
    this.#manifest = manifest;
    this.#entry = entry;
    this.#ort = ort;
    this.#session = session;
    this.#decoder = decoder;
    this.classes = Object.freeze([...manifest.classes]);
    this.precision = entry.precision;
    this.backend = backend;
    this.#gone = backend === "gpu" ? lossOf(ort) : undefined;
    this.#gone?.catch(() => {}); // who runs then is told
    this.steps = manifest.sampler.steps;
    this.name = manifest.name;
  }

  /** What the network works on: pixels, or the latents that the decoder takes. */
  get #shape() {
    return this.#manifest.latent ?? this.#manifest.image;
  }

  /** Whether a class can be chosen; otherwise all classes are merged into one. */
  get switches() {
    return this.#entry.inputs.some((each) => each.name === "class_index");
  }

  /** `n` pictures of a class, one after the other: image i starts from noise number `first + i` of `seed`. */
  async generate(className, { n = 1, seed = 0, first = 0, onStep, onPicture, signal } = {}) {
    const index = this.#classIndex(className);
    const key = parseSeed(seed);
    if (!Number.isInteger(n) || n < 1) throw new KindEdgeError(`n: got ${n}, want at least 1 picture`);
    const { channels, height, width } = this.#shape;
    const rows = this.#manifest.sampler.tables.timestep.length;
    const pictures = [];
    for (let i = 0; i < n; i++) {
      const noise = gaussianNoise(key, first + i, channels * height * width);
      const onRow = (row) => onStep?.(i * rows + row + 1, n * rows);
      const picture = await this.#decode(await this.#denoise(noise, index, onRow, signal));
      pictures.push(picture);
      onPicture?.(picture, i);
    }
    return pictures;
  }

  /** Give the memory back. The model cannot be used afterwards. */
  async release() {
    await this.#session.release();
    await this.#decoder?.release();
  }

  /** x_{i+1} = a x_i + b d_i + c d_{i-1}, d_i = p x_i + q prediction_i: one row of the tables is one evaluation. */
  async #denoise(noise, classIndex, onRow, signal) {
    const { tables } = this.#manifest.sampler;
    let sample = noise;
    let previous = new Float32Array(noise.length);
    for (let row = 0; row < tables.timestep.length; row++) {
      signal?.throwIfAborted();
      const prediction = await this.#guidedPrediction(sample, row, classIndex);
      const [p, q, a, b, c] = [tables.p, tables.q, tables.a, tables.b, tables.c].map((column) => column[row]);
      const direction = sample.map((x, i) => p * x + q * prediction[i]);
      const before = previous;
      sample = sample.map((x, i) => a * x + b * direction[i] + c * before[i]);
      previous = direction;
      onRow(row);
    }
    return sample;
  }

  /** null + guidance * (class - null), both in one batch of two, where the sampler is guided. */
  async #guidedPrediction(sample, row, classIndex) {
    const { guidance, null_index: nullIndex } = this.#manifest.sampler;
    if (nullIndex === null || guidance === 1) return this.#predict(sample, row, [classIndex]);
    const both = new Float32Array(2 * sample.length);
    both.set(sample);
    both.set(sample, sample.length);
    const found = await this.#predict(both, row, [classIndex, nullIndex]);
    const half = found.length / 2;
    const ofNull = found.subarray(half);
    return ofNull.map((value, i) => value + guidance * (found[i] - value));
  }

  /** One call of the network; a learned variance in its output is dropped. */
  async #predict(samples, row, classIndices) {
    const { channels, height, width } = this.#shape;
    const batch = classIndices.length;
    const values = {
      sample: samples,
      timestep: Array(batch).fill(this.#manifest.sampler.tables.timestep[row]),
      step_index: Array(batch).fill(row),
      class_index: classIndices,
    };
    const feeds = {};
    for (const { name, dtype } of this.#entry.inputs) {
      const shape = name === "sample" ? [batch, channels, height, width] : [batch];
      feeds[name] = this.#tensor(values[name], dtype, shape);
    }
    const output = (await this.#run(this.#session, feeds))[this.#entry.outputs[0].name];
    const [wanted, made] = [channels * height * width, output.data.length / batch];
    if (wanted === made) return output.data;
    const kept = new Float32Array(batch * wanted);
    for (let i = 0; i < batch; i++) kept.set(output.data.subarray(i * made, i * made + wanted), i * wanted);
    return kept;
  }

  /** On a GPU that is lost meanwhile a run would never end. */
  async #run(session, feeds) {
    if (!this.#gone) return session.run(feeds);
    const gone = this.#gone.catch((error) => {
      throw new KindEdgeError(`The GPU is gone (${error.message}): load the page again, or run on the CPU.`);
    });
    const run = session.run(feeds).catch(async (error) => {
      await Promise.race([gone, new Promise((resolve) => setTimeout(resolve, 100))]); // if that is why, it is said soon
      throw new KindEdgeError(`${this.#entry.path}: this GPU cannot run it: ${error.message}. Run it on the CPU.`);
    });
    return Promise.race([run, gone]);
  }

  async #decode(sample) {
    const { channels, height, width } = this.#shape;
    if (!this.#decoder) return new Picture(width, height, channels, sample.map((x) => Math.min(1, Math.max(-1, x))));
    const feeds = { latent: this.#tensor(sample, "float32", [1, channels, height, width]) };
    const { data, dims } = (await this.#run(this.#decoder, feeds)).image;
    return new Picture(dims[3], dims[2], dims[1], data.map((x) => 2 * x - 1));
  }

  #tensor(values, dtype, shape) {
    const array = ARRAYS[dtype];
    if (!array) throw new KindEdgeError(`${this.#entry.path}: cannot feed an input of type ${dtype}`);
    // Always a copy: a runtime that works in another thread takes the buffer away.
    const data = array.from(values, dtype === "int64" ? BigInt : Number);
    return new this.#ort.Tensor(dtype, data, shape);
  }

  #classIndex(className) {
    if (!this.switches) {
      if (className === undefined || (this.classes.length === 1 && className === this.classes[0])) return 0;
      throw new KindEdgeError(`this bundle merges its classes into one (${this.classes.join(", ")}); name none of them`);
    }
    if (className === undefined && this.classes.length === 1) return 0;
    const index = this.classes.indexOf(className);
    if (index < 0) throw new KindEdgeError(`unknown class ${className}; this bundle draws: ${this.classes.join(", ")}`);
    return index;
  }
}

/** `values` float32 in [-1, 1], channels x height x width. */
export class Picture {
  constructor(width, height, channels, values) {
    Object.assign(this, { width, height, channels, values });
  }

  /** uint8, height x width x 4, as canvases take it: round((x + 1) * 127.5), halves to even. */
  rgba() {
    const area = this.width * this.height;
    const pixels = new Uint8ClampedArray(area * 4).fill(255); // this type rounds halves to even by itself
    for (let i = 0; i < area; i++) {
      for (let c = 0; c < 3; c++) {
        pixels[4 * i + c] = (this.values[Math.min(c, this.channels - 1) * area + i] + 1) * 127.5;
      }
    }
    return pixels;
  }
}

function parseSeed(seed) {
  let value;
  try {
    value = BigInt(seed);
  } catch {
    value = -1n;
  }
  if (value < 0n || value >= 2n ** 64n) throw new KindEdgeError(`seed: got ${seed}, want an integer from 0 to 2^64 - 1`);
  return [Number(value & 0xffffffffn), Number(value >> 32n)];
}

function parseManifest(bytes) {
  let manifest;
  try {
    manifest = JSON.parse(new TextDecoder().decode(bytes));
  } catch (error) {
    throw new KindEdgeError(`manifest.json cannot be read: ${error.message}`);
  }
  if (manifest.schema_version !== 1) {
    throw new KindEdgeError(`manifest.json has version ${manifest.schema_version}, this script reads 1; export again`);
  }
  return manifest;
}

/** The packs that are to be joined; `options.packs` are their bytes. */
async function readPacks(folder, manifest, options) {
  const packs = await Promise.all((options.packs ?? []).map(readPack));
  if (!packs.length) return packs;
  if (!manifest.packs) throw new KindEdgeError("this bundle takes no packs: its classes are merged, or calibrated");
  for (const pack of packs) {
    if (pack.core !== manifest.packs.core) {
      throw new KindEdgeError(`the pack of ${pack.className} belongs to another core, not to this bundle's`);
    }
  }
  const names = [...manifest.classes, ...packs.map((pack) => pack.className)];
  const twice = names.find((name, i) => names.indexOf(name) !== i);
  if (twice !== undefined) throw new KindEdgeError(`${twice} is there already`);
  return packs;
}

/** The manifest with the packs' classes after the others; the null class follows the last one. */
function withClasses(manifest, packs) {
  const classes = [...manifest.classes, ...packs.map((pack) => pack.className)];
  const nullIndex = manifest.sampler.null_index === null ? null : classes.length;
  return { ...manifest, classes, sampler: { ...manifest.sampler, null_index: nullIndex } };
}

/** A model file with the packs' classes in it. */
async function addClasses(folder, manifest, path, bytes, packs, options) {
  const core = JSON.parse(new TextDecoder().decode(await readModel(folder, manifest, "packs/core.json", options)));
  const known = manifest.core_files?.[path] ?? path; // a page's folder has its own names
  if (!core.files[known]) throw new KindEdgeError(`packs fit ${Object.keys(core.files).join(", ")}, not ${path}`);
  const { shared, rows } = takeApart(core, known, bytes, manifest.classes.length);
  return joinFile(core, known, shared, [...rows, ...packs.map((pack) => pack.rows)]);
}

/** The denoiser of a path or precision; the bundle's own choice where none is asked for. */
function chooseModel(manifest, wanted = manifest.default_model) {
  const entries = ofRole(manifest, "denoiser");
  const found = entries.find((entry) => entry.path === wanted || entry.precision === wanted);
  if (!found) throw new KindEdgeError(`no model ${wanted}; there are: ${entries.map((e) => e.path).join(", ")}`);
  return found;
}

/** The decoder that goes with a denoiser, as in Python; undefined for models of pixels. */
function chooseDecoder(manifest, denoiser) {
  const decoders = ofRole(manifest, "decoder");
  const wanted = ["fp32", "fp16"].includes(denoiser.precision) ? denoiser.precision : "int8-weights";
  return decoders.find(({ precision }) => precision === wanted) ?? decoders.find(({ precision }) => precision === "fp32");
}

function ofRole(manifest, role) {
  return Object.entries(manifest.models)
    .map(([path, entry]) => ({ path, ...entry }))
    .filter((entry) => entry.role === role && entry.path.endsWith(".onnx"));
}

/** What runs on WebGPU, and where: refused in words before anything is fetched. */
async function checkGpu({ path, precision }) {
  if (IN_NODE) throw new KindEdgeError("backend gpu: only in a browser; in Node everything runs on the CPU");
  if (!/^fp/.test(precision)) throw new KindEdgeError(`${path}: WebGPU has no kernels for ${precision}; run it on the CPU`);
  const gpu = await findGpu();
  if (!gpu) throw new KindEdgeError("this browser gives us no WebGPU; run it on the CPU");
  if (precision === "fp16" && !gpu.half) throw new KindEdgeError(`${path}: this GPU has no fp16; run it on the CPU`);
}

async function importRuntime(folder, backend, threads) {
  if (IN_NODE) {
    const runtime = await import("onnxruntime-node");
    return runtime.default ?? runtime;
  }
  const file = backend === "gpu" ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs";
  const base = new URL(`${folder}/runtime/`, document.baseURI).href;
  let ort;
  try {
    ort = await import(base + file);
  } catch (error) {
    throw new KindEdgeError(`cannot fetch runtime/${file}: ${error.message}. Is the network there?`);
  }
  ort.env.wasm.wasmPaths = base;
  ort.env.wasm.proxy = backend === "cpu"; // in a worker: the page stays alive, and can be stopped
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated
    ? (threads ?? Math.min(MAX_THREADS, navigator.hardwareConcurrency || 1))
    : 1; // without the two headers a page gets no shared memory, so no threads
  return ort;
}

/** On the backend that was asked for, and on no other. */
async function openSession(ort, bytes, path, backend, threads) {
  const provider = IN_NODE ? "cpu" : backend === "gpu" ? "webgpu" : "wasm";
  const options = { executionProviders: [provider], logSeverityLevel: 3 }; // errors alone: they come as exceptions
  if (IN_NODE && threads) options.intraOpNumThreads = threads;
  try {
    return await ort.InferenceSession.create(bytes, options);
  } catch (error) {
    throw new KindEdgeError(`${path}: ONNX Runtime cannot load it: ${error.message}`);
  }
}

/** A model's bytes; a copy that does not agree with its hash is fetched past every cache once, then refused. */
async function readModel(folder, manifest, path, options) {
  const wanted = manifest.files[path];
  let bytes = await readFile(folder, path, options, wanted?.bytes);
  if (await isDamaged(bytes, wanted)) bytes = await readFile(folder, path, { ...options, reload: true }, wanted?.bytes);
  if (await isDamaged(bytes, wanted)) {
    throw new KindEdgeError(`${path} is damaged: it is not the file that was exported. Copy the folder again.`);
  }
  return bytes;
}

async function isDamaged(bytes, wanted) {
  if (!wanted) return true;
  if (bytes.length !== wanted.bytes) return true;
  const digest = await sha256(bytes);
  return digest !== undefined && digest !== wanted.sha256;
}

async function readFile(folder, path, { signal, onBytes, reload }, totalBytes) {
  if (IN_NODE && !/^https?:/.test(String(folder))) {
    const { readFile: read } = await import("node:fs/promises");
    const { join } = await import("node:path");
    try {
      return new Uint8Array(await read(join(String(folder), path)));
    } catch (error) {
      throw new KindEdgeError(`cannot read ${path} in ${folder}: ${error.message}`);
    }
  }
  const url = IN_NODE ? `${folder}/${path}` : new URL(`${folder}/${path}`, document.baseURI);
  let response;
  try {
    response = await fetch(url, { signal, cache: reload ? "reload" : "default" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new KindEdgeError(`cannot fetch ${path}: ${error.message}. Is the network there?`);
  }
  if (!response.ok) throw new KindEdgeError(`cannot fetch ${path}: the server answers ${response.status}`);
  return onBytes && totalBytes ? counted(response, path, totalBytes, onBytes) : new Uint8Array(await response.arrayBuffer());
}

async function counted(response, path, totalBytes, onBytes) {
  const chunks = [];
  let done = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { value, done: ended } = await reader.read();
    if (ended) break;
    chunks.push(value);
    done += value.length;
    onBytes(done, totalBytes, path);
  }
  const bytes = new Uint8Array(done);
  let at = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, at);
    at += chunk.length;
  }
  return bytes;
}

/** Pictures from a kind-edge bundle, in a browser (onnxruntime-web) or in Node (onnxruntime-node). */

export class KindEdgeError extends Error {}

export interface LoadOptions {
  /** A precision such as "int8", or a model file of the manifest; the bundle's own choice if left out. */
  model?: string;
  /** Browsers only: "gpu" runs on WebGPU, or is refused. */
  backend?: "cpu" | "gpu";
  threads?: number;
  /** Bytes of class packs, whose classes are added after the bundle's own. */
  packs?: Uint8Array[];
  /** A module `onnxruntime-web` or `onnxruntime-node` of your own. */
  ort?: unknown;
  /** Told while a model file is fetched. */
  onBytes?: (done: number, total: number, path: string) => void;
  signal?: AbortSignal;
}

export interface GenerateOptions {
  n?: number;
  /** 0 to 2^64 - 1; the same seed gives the same pictures in every runtime. */
  seed?: number | bigint | string;
  /** Number of the first picture in the seed's run. */
  first?: number;
  /** Told after every evaluation of the network. */
  onStep?: (done: number, total: number) => void;
  onPicture?: (picture: Picture, index: number) => void;
  signal?: AbortSignal;
}

export class Picture {
  readonly width: number;
  readonly height: number;
  readonly channels: number;
  /** float32 in [-1, 1], channels x height x width. */
  readonly values: Float32Array;
  /** uint8, height x width x 4, as `ImageData` takes it. */
  rgba(): Uint8ClampedArray<ArrayBuffer>;
}

export interface Model {
  readonly name: string;
  readonly classes: readonly string[];
  readonly precision: string;
  readonly backend: "cpu" | "gpu";
  readonly steps: number;
  /** Whether a class can be chosen; otherwise all classes are merged into one. */
  readonly switches: boolean;
  generate(className?: string, options?: GenerateOptions): Promise<Picture[]>;
  release(): Promise<void>;
}

/** Open a folder that holds `manifest.json`: a bundle, or its `web` folder; a path (Node) or a URL. */
export function load(folder?: string, options?: LoadOptions): Promise<Model>;

/** Standard normal noise of one picture; `key` holds the low and the high 32 bits of the seed. */
export function gaussianNoise(key: readonly [number, number], image: number, count: number): Float32Array;

// A page's own code against kind-edge.d.ts: every name, as an app would use it. The compiler reads it; nobody runs it.
import { gaussianNoise, KindEdgeError, load, Picture } from "./kind-edge.js";
import type { GenerateOptions, LoadOptions, Model } from "./kind-edge.js";

const stop = new AbortController();
const opening: LoadOptions = {
  model: "int8",
  backend: "gpu",
  threads: 2,
  packs: [new Uint8Array(8)],
  ort: {},
  onBytes: (done: number, total: number, path: string) => console.log(done / total, path),
  signal: stop.signal,
};
const drawing: GenerateOptions = {
  n: 4,
  seed: 2n ** 63n,
  first: 1,
  onStep: (done: number, total: number) => console.log(done, total),
  onPicture: (picture: Picture, index: number) => console.log(picture.width, index),
  signal: stop.signal,
};

export async function draw(): Promise<ImageData[]> {
  const model: Model = await load("out/web", opening);
  const name: string | undefined = model.classes[0];
  const facts: [string, string, number, boolean] = [model.name, model.precision, model.steps, model.switches];
  try {
    const pictures: Picture[] = await model.generate(name, drawing);
    const values: Float32Array = pictures.map((picture) => picture.values)[0] ?? gaussianNoise([7, 0], 0, 16);
    console.log(facts, values.length, pictures.map((picture) => picture.channels));
    return pictures.map((picture) => new ImageData(picture.rgba(), picture.width, picture.height));
  } catch (error) {
    if (error instanceof KindEdgeError) console.log(error.message);
    throw error;
  } finally {
    await model.release();
  }
}

// What must not pass; the compiler fails if one of these lines has no error.
// @ts-expect-error a seed is no boolean
drawing.seed = true;
// @ts-expect-error there is no such backend
opening.backend = "npu";
// @ts-expect-error a picture is read only
export const widen = (picture: Picture) => (picture.width = 3);

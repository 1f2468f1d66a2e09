/**
 * Class packs: more classes for a model file, by concatenation; docs/packs.md has the format. No dependencies.
 *
 *     const pack = await readPack(bytes);
 *     const { shared, rows } = takeApart(core, path, file, 2);
 *     const joined = joinFile(core, path, shared, [...rows, pack.rows]);
 */

export class PackError extends Error {
  name = "PackError";
}

/** A model file of `count` classes -> the bytes they share, and the rows of every class by table. */
export function takeApart(core, path, file, count) {
  const rows = Array.from({ length: count }, () => ({}));
  const shared = [];
  let at = 0;
  const take = (size) => {
    if (at + size > file.length) throw new PackError(`${path} ends before the core says so; export again`);
    return file.subarray(at, (at += size));
  };
  const skipVarint = () => {
    while (take(1)[0] & 0x80);
  };
  const walk = (parts) => {
    for (const part of parts) {
      if (typeof part === "number") shared.push(take(part));
      else if ("rows" in part) for (const own of rows) own[part.rows] = take(rowBytes(core.tables[part.rows]));
      else if ("int64" in part) take(8);
      else if ("metadata" in part) shared.push(take(file.length - at));
      else {
        skipVarint();
        if ("message" in part) walk(part.message);
      }
    }
  };
  walk(core.files[path].parts);
  if (at !== file.length) throw new PackError(`${path} is not the file that the core describes; export again`);
  return { shared: concat(shared), rows };
}

/** The other way round, with the rows of any classes, in their order. */
export function joinFile(core, path, shared, classes) {
  let at = 0;
  const write = (part) => {
    if (typeof part === "number") return [shared.subarray(at, (at += part))];
    if ("rows" in part) return classes.map((own) => own[part.rows]);
    if ("count" in part) return [varint(classes.length + part.count)];
    if ("metadata" in part) return [shared.subarray(at)];
    if ("int64" in part) return [new Uint8Array(BigInt64Array.of(BigInt(classes.length + part.int64)).buffer)];
    const inner = part.message.flatMap(write);
    return [varint(inner.reduce((sum, chunk) => sum + chunk.length, 0)), ...inner];
  };
  return concat(core.files[path].parts.flatMap(write));
}

/** A pack's class, the hash of the core that it is for, and its rows. A damaged file is refused. */
export async function readPack(file) {
  try {
    const size = Number(new DataView(file.buffer, file.byteOffset).getBigUint64(0, true));
    const { __metadata__: told, ...tensors } = JSON.parse(new TextDecoder().decode(file.subarray(8, 8 + size)));
    const data = file.subarray(8 + size);
    const rows = {};
    for (const [name, { data_offsets: range }] of Object.entries(tensors)) rows[name] = data.subarray(...range);
    if (!told.class || !told.core) throw new PackError("it names no class");
    const digest = await sha256(file.subarray(0, file.length - 32));
    if (digest && digest !== hexadecimal(file.subarray(file.length - 32))) throw new PackError("its hash is wrong");
    return { className: told.class, core: told.core, rows };
  } catch (error) {
    throw new PackError(`not a class pack, or a damaged one: ${error.message}`);
  }
}

/** SHA-256 in hexadecimal digits; undefined where the browser has none: over plain http, but for localhost. */
export async function sha256(bytes) {
  const subtle = globalThis.crypto?.subtle;
  return subtle ? hexadecimal(new Uint8Array(await subtle.digest("SHA-256", bytes))) : undefined;
}

function hexadecimal(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function rowBytes({ dtype, shape }) {
  return shape.reduce((a, b) => a * b, Number(dtype.slice(-2).replace(/\D/g, "")) / 8);
}

export function varint(value) {
  const out = [];
  for (; value > 127; value = Math.floor(value / 128)) out.push((value % 128) + 128);
  return Uint8Array.from([...out, value]);
}

export function concat(chunks) {
  const out = new Uint8Array(chunks.reduce((sum, chunk) => sum + chunk.length, 0));
  let at = 0;
  for (const chunk of chunks) {
    out.set(chunk, at);
    at += chunk.length;
  }
  return out;
}

/** The page around kind-edge.js: choose, draw, watch, save. */
import { load } from "./kind-edge.js";
import { findGpu } from "./webgpu.js";

const $ = (id) => document.getElementById(id);
const form = $("controls");
const [picker, runner, draw, stop, progress, status, gallery] = [
  "class", "runs-on", "draw", "stop", "progress", "status", "gallery",
].map($);
const manifest = await fetch("manifest.json")
  .then((response) => response.json())
  .catch((error) => {
    say(`manifest.json cannot be read: ${error.message}. Copy the folder again.`, true);
    throw error;
  });
const opened = new Map(); // "int8/cpu" -> model
const packs = []; // bytes of what was added
let running;

document.title = manifest.name;
$("title").textContent = manifest.name;
$("steps").textContent = `${manifest.sampler.steps} ${manifest.sampler.kind} steps`;
$("source").textContent = `model ${manifest.source.model}, ${manifest.source.checkpoint_sha256.slice(0, 12)}`;
for (const name of manifest.classes) picker.add(new Option(name, name));
const merged = !Object.values(manifest.models).some((each) => each.inputs.some(({ name }) => name === "class_index"));
if (merged) picker.replaceChildren(new Option(manifest.classes.join(" + "), ""));
await offerRunners();
draw.disabled = false;
say("Ready.");

$("more").hidden = !manifest.packs;
$("packs").addEventListener("change", () => void addClasses());

form.addEventListener("submit", (event) => {
  event.preventDefault();
  void paint();
});
stop.addEventListener("click", () => running?.abort());
if ("serviceWorker" in navigator) {
  navigator.serviceWorker.register("offline.js").then(
    () => navigator.serviceWorker.ready.then(() => document.body.setAttribute("data-offline", "ready")),
    () => {}, // without https there is none: the page works, but not offline
  );
}

/** int8 runs on the CPU alone: WebGPU has no integer products. Nor has every GPU fp16; and some are none. */
async function offerRunners() {
  const gpu = await findGpu();
  for (const [path, { role, precision }] of Object.entries(manifest.models)) {
    if (role !== "denoiser") continue;
    const chosen = path === manifest.default_model;
    runner.add(new Option(`CPU, ${precision}`, `${precision}/cpu`, chosen, chosen));
    if (!gpu || !(precision === "fp32" || (precision === "fp16" && gpu.half))) continue;
    runner.add(new Option(`GPU${gpu.software ? " in software" : ""}, ${precision}`, `${precision}/gpu`));
  }
}

/** Class packs from this device; the models that they fit take them, and no others are offered from then on. */
async function addClasses() {
  const added = await Promise.all([...$("packs").files].map(async (file) => new Uint8Array(await file.arrayBuffer())));
  const fitting = [...runner.options].filter((option) => takesPacks(option.value.split("/")[0]));
  const choice = fitting.find((option) => option.selected) ?? fitting[0];
  draw.disabled = true;
  try {
    const model = await load(".", { ...parts(choice.value), packs: [...packs, ...added] });
    packs.push(...added);
    opened.clear();
    opened.set(choice.value, model);
    const before = picker.options.length;
    picker.replaceChildren(...model.classes.map((name) => new Option(name, name)));
    picker.selectedIndex = before;
    runner.replaceChildren(...fitting);
    runner.value = choice.value;
    say(`Added: ${model.classes.slice(before).join(", ")}.`);
  } catch (error) {
    say(error.message, true);
  } finally {
    $("packs").value = "";
    draw.disabled = false;
  }
}

function takesPacks(precision) {
  return Object.keys(manifest.core_files).some((path) => manifest.models[path].precision === precision);
}

function parts(choice) {
  const [model, backend] = choice.split("/");
  return { model, backend };
}

async function paint() {
  running = new AbortController();
  const { signal } = running;
  stop.disabled = false;
  if (document.activeElement === draw) stop.focus(); // a disabled button loses the keyboard's place
  draw.disabled = true;
  advance(0, 1);
  gallery.replaceChildren();
  gallery.setAttribute("aria-busy", "true");
  try {
    const model = await open(runner.value, signal);
    await generate(model, signal);
  } catch (error) {
    say(signal.aborted ? "Stopped." : error.message, !signal.aborted);
  } finally {
    draw.disabled = false;
    if (document.activeElement === stop) draw.focus();
    stop.disabled = true;
    gallery.setAttribute("aria-busy", "false");
  }
}

async function open(choice, signal) {
  if (opened.has(choice)) return opened.get(choice);
  say(`Loading the ${parts(choice).model} model…`);
  const model = await load(".", { ...parts(choice), packs, signal, onBytes: (done, total) => advance(done, total) });
  opened.set(choice, model);
  return model;
}

async function generate(model, signal) {
  const [name, seed, n] = [picker.value || undefined, $("seed").value.trim() || "0", Number($("count").value)];
  say(`Drawing ${n} × ${name ?? picker.options[0].text}…`);
  const began = performance.now();
  await model.generate(name, {
    n,
    seed,
    signal,
    onStep: advance,
    onPicture: (picture, i) => gallery.append(framed(picture, `${name ?? model.classes.join(" + ")}, seed ${seed}, number ${i}`)),
  });
  const each = (performance.now() - began) / n;
  say(`${n} ${n === 1 ? "picture" : "pictures"}, ${format(each)} each, on the ${runner.selectedOptions[0].text}.`);
}

/** A picture that can be saved by click or by keyboard. */
function framed(picture, label) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.width, picture.height];
  canvas.getContext("2d").putImageData(new ImageData(picture.rgba(), picture.width, picture.height), 0, 0);
  canvas.classList.toggle("small", picture.width < 64);
  const link = document.createElement("a");
  link.href = canvas.toDataURL();
  link.download = `${label.replaceAll(/[^\w-]+/g, "-")}.png`;
  link.setAttribute("aria-label", `${label}; save`);
  link.append(canvas);
  return link;
}

function advance(done, total) {
  [progress.max, progress.value] = [total, done];
}

function say(text, failed = false) {
  status.textContent = text;
  status.classList.toggle("failed", failed);
}

function format(milliseconds) {
  return milliseconds < 1000 ? `${milliseconds.toPrecision(3)} ms` : `${(milliseconds / 1000).toPrecision(3)} s`;
}

"""Images from a bundle, with numpy and onnxruntime alone; the reference for the runtimes in other languages.

Symbols: n images, ch x H x W the network's own input, K classes. One row of the manifest's tables is one evaluation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kind_edge.deploy.bundle import open_bundle, verified_manifest
from kind_edge.deploy.manifest import Manifest, ModelEntry, read_manifest
from kind_edge.deploy.noise import gaussian_noise
from kind_edge.deploy.packs_join import core_of, join, read_packs
from kind_edge.deploy.session import open_session
from kind_edge.errors import InputError, UsageError, unknown

FloatArray = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.int64]
OnStep = Callable[[int, int], None]

MAX_IMAGES = 100_000
"""Images per call of `generate`: they are all held in memory."""

MAX_BATCH = 32
"""Images per call of the network: bounds memory, and beyond it a CPU gains nothing."""

_RUNNABLE = (".onnx", ".ort")
_KNOWN_INPUTS = {
    "denoiser": ("sample", "timestep", "step_index", "class_index"),
    "sampler": ("noise", "class_index", "guidance"),
}
_NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}


@dataclass(frozen=True)
class LoadedBundle:
    """A bundle with one of its models opened: a denoiser (one evaluation per call) or a sampler (the whole loop).

    Beside the denoiser of a latent model its `decoder` is open, which takes one image at a time: its activations are
    large.

    The same seed gives the same images whatever `n` is and whichever other classes are asked for. With fp32 and fp16
    that holds up to the rounding of the matrix products, which may differ with the batch: a pixel may move by one of
    255 levels. int8 models quantize activations on the fly with one range for the whole batch, so images of a batch
    would change each other; they are therefore evaluated one image at a time, class and null row of an image in one
    batch, as an app does that makes a single image. So are the images of a static model, whose batch is fixed.
    """

    manifest: Manifest
    model: ModelEntry
    session: Any = dataclasses.field(repr=False)
    decoder: Any = dataclasses.field(default=None, repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    @property
    def batch_images(self) -> int:
        """Images that share a call of the network."""
        return 1 if self.model.precision == "int8" or self.model.fixed_batch else MAX_BATCH

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the loop works on."""
        size = self.manifest.latent or self.manifest.image
        return size.channels, size.height, size.width

    def generate(
        self,
        class_name: str | Sequence[str] | None = None,
        n: int = 1,
        seed: int = 0,
        on_step: OnStep | None = None,
    ) -> npt.NDArray[np.uint8]:
        """`n` images of a class, or `n` of each of several classes one after the other: uint8 [n * classes, H, W, ch].

        Image i of every class starts from noise number i of `seed`. `class_name` may be left out where there is nothing
        to choose. `on_step(done, total)` is called after every row of the sampler's tables.
        Raises `UsageError` for an unknown class or a choice that the model does not offer.
        """
        if n < 1:
            raise UsageError(f"n: got {n}, want at least 1 image")
        if n > MAX_IMAGES:
            raise UsageError(f"n: got {n}, want at most {MAX_IMAGES} images at once; use other seeds for more")
        indices = self._class_indices(class_name)
        noise = gaussian_noise(seed, 0, n, self.noise_shape)
        images = self.sample_float(np.tile(noise, (len(indices), 1, 1, 1)), np.repeat(indices, n), on_step)
        return to_pixels(images)

    def sample_float(self, noise: FloatArray, class_index: IndexArray, on_step: OnStep | None = None) -> FloatArray:
        """The loop from noise [n, ch, H, W] and classes int64 [n] to images clipped to [-1, 1], [n, ch, H, W].

        Latents are decoded: noise [n, ch, h, w] gives images [n, C, H, W].
        """
        starts = range(0, len(noise), self.batch_images)
        rows = 1 if self.model.role == "sampler" else len(self.manifest.sampler.tables)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if on_step is not None:
                on_step(done, rows * len(starts))

        sample = self._run_sampler if self.model.role == "sampler" else self._denoise
        parts = [
            sample(noise[at : at + self.batch_images], class_index[at : at + self.batch_images], advance)
            for at in starts
        ]
        return np.clip(np.concatenate(parts), -1.0, 1.0)

    def guided_prediction(self, sample: FloatArray, row: int, class_index: IndexArray) -> FloatArray:
        """Row `row`'s prediction, null + guidance * (class - null) where the bundle is guided: float32 [n, ch, H, W].

        Both branches are one batch of 2n, class rows first.
        """
        sampler = self.manifest.sampler
        if sampler.null_index is None or not sampler.guided:  # also where guidance is inside the model
            return self.predict(sample, row, class_index)
        nulls = np.full_like(class_index, sampler.null_index)
        both = self.predict(np.concatenate([sample, sample]), row, np.concatenate([class_index, nulls]))
        of_class, of_null = np.split(both, 2)
        guided: FloatArray = of_null + np.float32(sampler.guidance) * (of_class - of_null)
        return guided

    def predict(self, sample: FloatArray, row: int, class_index: IndexArray) -> FloatArray:
        """One call of the network, no guidance: float32 [n, ch, H, W] at row `row` of the tables, classes int64 [n].

        A learned variance in the output is dropped. An int8 model's rows influence each other here: the batch is the
        caller's own.
        """
        rows = len(sample)
        values = {
            "sample": sample,
            "timestep": np.full(rows, self.manifest.sampler.tables.timestep[row]),
            "step_index": np.full(rows, row),
            "class_index": np.asarray(class_index),
        }
        return self._run(values)[:, : sample.shape[1]]

    def _denoise(self, noise: FloatArray, class_index: IndexArray, advance: Callable[[], None]) -> FloatArray:
        tables = self.manifest.sampler.tables
        sample, previous = noise, np.zeros_like(noise)
        for row in range(len(tables)):
            p, q, a, b, c = (np.float32(column[row]) for column in (tables.p, tables.q, tables.a, tables.b, tables.c))
            direction = p * sample + q * self.guided_prediction(sample, row, class_index)
            sample, previous = a * sample + b * direction + c * previous, direction
            advance()
        return self._decode(sample) if self.decoder is not None else sample

    def _decode(self, latent: FloatArray) -> FloatArray:
        """Latents [n, ch, h, w] to images in [-1, 1], [n, C, H, W]."""
        parts = [self.decoder.run(["image"], {"latent": latent[at : at + 1]})[0] for at in range(len(latent))]
        return np.concatenate(parts) * np.float32(2) - np.float32(1)  # the decoder's images are in [0, 1]

    def _run_sampler(self, noise: FloatArray, class_index: IndexArray, advance: Callable[[], None]) -> FloatArray:
        guidance = np.array(self.manifest.sampler.guidance)
        image = self._run({"noise": noise, "class_index": np.asarray(class_index), "guidance": guidance})
        advance()
        return image * np.float32(2) - np.float32(1)  # the sampler's images are in [0, 1]

    def _run(self, values: dict[str, npt.NDArray[Any]]) -> FloatArray:
        feeds = {tensor.name: values[tensor.name].astype(_NUMPY_TYPES[tensor.dtype]) for tensor in self.model.inputs}
        output = self.session.run([self.model.outputs[0].name], feeds)[0]
        return np.asarray(output, np.float32)

    def _class_indices(self, class_name: str | Sequence[str] | None) -> IndexArray:
        if class_name is None:
            if len(self.classes) > 1 and "class_index" in self.model.input_names():
                raise UsageError(f"which class? This bundle makes: {', '.join(self.classes)}")
            return np.zeros(1, np.int64)
        names = [class_name] if isinstance(class_name, str) else list(class_name)
        if not names:
            raise UsageError(f"no class named; this bundle makes: {', '.join(self.classes)}")
        for name in names:
            if name not in self.classes:
                raise unknown("class", name, self.classes)
        if len(self.classes) > 1 and "class_index" not in self.model.input_names():
            raise UsageError(
                f"this bundle merges its classes into one ({', '.join(self.classes)}) and cannot tell them apart; "
                "leave the class out, or export with --form switch"
            )
        return np.array([self.classes.index(name) for name in names], np.int64)


def load_bundle(
    path: Path | str,
    model: str | None = None,
    threads: int | None = None,
    verify: bool = True,
    provider: str = "cpu",
    packs: Sequence[Path | str] = (),
    key: Path | str | None = None,
) -> LoadedBundle:
    """Open a bundle (folder or `.zip`) for generation.

    `model` is a precision ("fp32") or a file of the bundle; None takes the bundle's default, the plan's choice.
    `threads` None takes what the bundle says is quickest, or leaves the number to ONNX Runtime. With `verify` every
    hash is checked first; with `key`, a PEM file with a public Ed25519 key, the signature before them (that needs the
    library cryptography). `packs` are files of further classes, joined on the way: the bundle itself stays as it is.
    Raises `InputError` for a damaged bundle or pack, `UsageError` for an unknown model or an unavailable provider.
    """
    if key is not None and not verify:
        raise UsageError("key: a signature says nothing of files whose hashes are not checked; leave verify on")
    with open_bundle(path) as folder:
        manifest = verified_manifest(folder, str(path), key) if verify else read_manifest(folder)
        entry = choose_model(manifest, model)
        threads = manifest.threads if threads is None else threads
        with _with_packs(folder, manifest, entry, packs, str(path)) as (place, manifest):
            manifest.require_classes(str(path))
            _check_entry(entry, manifest, str(path))
            session = open_session(place / entry.path, threads, provider)
        beside = manifest.decoder_for(entry)
        decoder = open_session(folder / beside.path, threads, provider) if beside else None
    names = {tensor.name for tensor in session.get_inputs()}
    if names != set(entry.input_names()):
        raise InputError(
            f"{path}: {entry.path}: its inputs are {sorted(names)}, the manifest says {sorted(entry.input_names())}"
        )
    return LoadedBundle(manifest, entry, session, decoder)


@contextlib.contextmanager
def _with_packs(
    folder: Path, manifest: Manifest, entry: ModelEntry, packs: Sequence[Path | str], where: str
) -> Iterator[tuple[Path, Manifest]]:
    """A folder that holds the model with the packs' classes, and the manifest that goes with it."""
    if not packs:
        yield folder, manifest
        return
    core = core_of(folder, manifest, where)
    if entry.path not in core.files:
        raise UsageError(f"{where}: {entry.path} cannot take packs; those that can: {', '.join(core.files)}")
    joined = join(folder, manifest, core, None, read_packs(packs, core, manifest.classes), only=[entry.path])
    with tempfile.TemporaryDirectory(prefix="kind-edge-") as temporary:
        place = Path(temporary, entry.path)
        place.parent.mkdir(parents=True)
        place.write_bytes(joined.models[entry.path])
        yield Path(temporary), Manifest.from_dict({**joined.values, "files": manifest.raw["files"]}, where)


def choose_model(manifest: Manifest, model: str | None = None) -> ModelEntry:
    """The model of a path or precision that ONNX Runtime can run; the default first, then denoisers before samplers."""
    roles = {"denoiser": 0, "sampler": 1}
    entries = [entry for entry in manifest.models.values() if entry.role in roles and entry.path.endswith(_RUNNABLE)]
    if not entries:
        raise UsageError(f"this bundle holds no ONNX model ({', '.join(manifest.models)}); export with --formats onnx")
    if model in manifest.models and model not in [entry.path for entry in entries]:
        raise UsageError(f"{model} is not an ONNX denoiser or sampler; those are: {', '.join(e.path for e in entries)}")
    wanted = manifest.default_model if model is None else model
    entries.sort(key=lambda entry: (entry.path != manifest.default_model, roles[entry.role], entry.path))
    for entry in entries:
        if wanted in (entry.path, entry.precision):
            return entry
    if model is None:  # the default is for another runtime, a Core ML package for instance
        return entries[0]
    raise unknown("model", model, [entry.path for entry in entries] + sorted({entry.precision for entry in entries}))


def to_pixels(images: FloatArray) -> npt.NDArray[np.uint8]:
    """Images in [-1, 1], [n, ch, H, W], to uint8 [n, H, W, ch]: round((x + 1) * 127.5), halves to even."""
    pixels = np.rint((np.clip(images, -1.0, 1.0) + np.float32(1)) * np.float32(127.5))
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1).astype(np.uint8))


def _check_entry(entry: ModelEntry, manifest: Manifest, where: str) -> None:
    """Whether the loop here can feed this model and show what it makes."""
    known = _KNOWN_INPUTS[entry.role]
    for tensor in entry.inputs:
        if tensor.name not in known or tensor.dtype not in _NUMPY_TYPES:
            raise InputError(
                f"{where}: {entry.path}: cannot feed input {tensor.name!r} of type {tensor.dtype}; "
                f"a {entry.role} takes {', '.join(known)}"
            )
    size = manifest.latent or manifest.image
    start = next((tensor for tensor in entry.inputs if tensor.name in ("sample", "noise")), None)
    if not entry.outputs or start is None or start.shape[1:] != (size.channels, size.height, size.width):
        like = "latent" if manifest.latent else "image"
        raise InputError(
            f"{where}: {entry.path}: want an output, and an input shaped like the {like} "
            f"[batch, {size.channels}, {size.height}, {size.width}]; got {start.shape if start else 'none'}"
        )
    if entry.role == "denoiser" and manifest.sampler.guided and "class_index" not in entry.input_names():
        raise InputError(f"{where}: {entry.path}: guidance {manifest.sampler.guidance} needs an input class_index")

"""Judging images of a checkpoint (through the gated model) or of a bundle (through ONNX Runtime, as it is shipped)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from kind_edge.deploy.runtime import load_bundle
from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import checkpoint_hash, load_checkpoint
from kind_edge.model.shipped import find_model
from kind_edge.model.spec import check_sampling
from kind_edge.training.examiner import Examiner, Subject, open_examiner
from kind_edge.training.sampled import Evaluation, Sampling, draw_classes, sampling_of, spread


def evaluate(
    source: str | Path,
    images: int = 1000,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    data: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    inception_weights: Path | None = None,
    class_map: Path | None = None,
    on_note: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Judge images of a checkpoint (sampled through the gated model) or of a bundle (through ONNX Runtime).

    With a file of Inception's weights, Fréchet distance, precision and recall are of its features. `data` and
    `class_map` name the real images, as `train` takes them; without, they are Fashion-MNIST's. All of it is opened
    before the first image is drawn.
    """

    def examiner_of(subject: Subject) -> Examiner:
        return open_examiner(subject, data, class_map, inception_weights, on_note)

    if (Path(source) / "manifest.json").exists() or str(source).endswith(".zip"):
        if steps is not None or guidance is not None:
            raise UsageError("--steps and --guidance are fixed in a bundle; evaluate the checkpoint, or export again")
        return _evaluate_bundle(Path(source), images, seed, examiner_of, on_progress)
    folder = find_model(source)
    checkpoint = load_checkpoint(folder)
    spec, sampling = checkpoint.spec, sampling_of(checkpoint, steps, guidance)
    check_sampling(spec, sampling.steps, sampling.guidance, sampling.sampler)
    index = spread(images, spec.num_classes)
    examiner = examiner_of(Subject(checkpoint.class_names, spec.channels, spec.image_size, spec.pixels_per_latent))
    quality = examiner.score(draw_classes(checkpoint, index, seed, sampling, on_progress), index)
    return Evaluation("checkpoint", checkpoint_hash(folder), "fp32", sampling, seed, quality)


def _evaluate_bundle(
    path: Path,
    images: int,
    seed: int,
    examiner_of: Callable[[Subject], Examiner],
    on_progress: Callable[[int, int], None] | None,
) -> Evaluation:
    """Images of the bundle's classes in equal shares, through its default model, as it is shipped."""

    bundle = load_bundle(path)
    image = bundle.manifest.image
    switches = "class_index" in bundle.model.input_names()
    if not switches and len(bundle.classes) > 1:
        raise UsageError(f"{path}: its classes are folded together (union), so no image has one class to be judged by")
    index = spread(images, len(bundle.classes))
    counts = np.bincount(index)
    examiner = examiner_of(Subject(bundle.classes, image.channels, image.height))
    parts = []
    for name, count in zip(bundle.classes, counts, strict=True):
        parts.append(bundle.generate(name if switches else None, int(count), seed))
        if on_progress:
            on_progress(sum(map(len, parts)), images)
    sampler = bundle.manifest.sampler
    source = bundle.manifest.raw.get("source", {})
    return Evaluation(
        "bundle",
        str(source.get("checkpoint_sha256", "")),
        bundle.model.precision,
        Sampling(
            sampler.kind,
            sampler.steps,
            sampler.guidance if sampler.inside_guidance is None else sampler.inside_guidance,
            sampler.inside_guidance is not None,
        ),
        seed,
        examiner.score(np.concatenate(parts), index),
    )

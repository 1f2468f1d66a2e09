"""New classes for a trained model: KIND's tailors against LoRA, full fine-tuning and training from scratch.

A model learns seven classes of Fashion-MNIST (KIND, and an ordinary DiT of the same shape with a label embedding for
the baselines, on as many images). Then it learns, from equally many images:
near   the other three classes
far    scikit-learn's handwritten digits, enlarged from 8 x 8 to 28 x 28, without the seven classes

kind       tailors alone, on the frozen learngene
lora       one adapter (peft) in the same six matrices of the ordinary model, its rank the one whose size is closest to
           the tailors'; and the label rows
full       every weight of the ordinary model
scratch    the ordinary model from random weights

Every seed trains everything anew. Judged are the new classes alone: by the judge of Fashion-MNIST, and for digits by a
classifier of the same kind. A Frechet distance compares within a domain only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import CONFIG, Checkpoint, load_checkpoint
from kind_edge.model.dit import DiT, initialise
from kind_edge.model.sampling import guided, sample
from kind_edge.model.spec import ModelSpec
from kind_edge.training.adapt import WARMUP_STEPS, adapt_config, adapt_to
from kind_edge.training.batches import Batch
from kind_edge.training.classifier import Classifier, embed, train_classifier
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import (
    CLASS_NAMES,
    DataSplit,
    FashionMNIST,
    fashion_mnist_split,
    in_memory,
    load_fashion_mnist,
)
from kind_edge.training.evaluate import Judge
from kind_edge.training.loop import Noised, Progress, part_loss, run
from kind_edge.training.metrics import frechet_distance, gaussian_of
from kind_edge.training.newcomers import Request, begin
from kind_edge.training.state import STATE, TrainState, load_state, save_state, start_from
from kind_edge.training.train import train_stages
from studies.statistics import cell, markdown
from studies.store import Record, Store, subject_of

NAME = "transfer"
OLD, NEW = CLASS_NAMES[:7], CLASS_NAMES[7:]
DIGITS = tuple("0123456789")
DOMAINS, METHODS = ("near", "far"), ("kind", "lora", "full", "scratch")
SPEC = ModelSpec(
    image_size=28, channels=1, patch_size=4, width=64, depth=4, heads=4, num_classes=len(OLD),
    learngene_rank=24, tailor_rank=6, objective="flow",
)  # fmt: skip
"""N_T is about 0.1 D, as the authors take it for a new task."""
BEFORE_IMAGES, IMAGES, JUDGED_IMAGES = 120_000, 30_000, 1_000
STEPS, GUIDANCE, BATCH = 20, 1.5, 50
HELDOUT_DIGITS = 30
JUDGE_EPOCHS = 30
FULL_RATE_SHARE = 0.3
"""Of the learning rate from scratch, for weights that are good already."""
CPU = torch.device("cpu")
Pixels = NDArray[np.uint8]


# --- data and judges --------------------------------------------------------------------------------------------------


def digits() -> FashionMNIST:
    """1797 digits of 8 x 8, enlarged bicubically to 20 x 20 in a margin of 4; the first 30 of each are held out."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    small = (found.images * (255 / 16)).round().astype(np.uint8)
    large = [np.pad(np.asarray(Image.fromarray(x).resize((20, 20), Image.Resampling.BICUBIC)), 4) for x in small]
    images, labels = np.stack(large), found.target.astype(np.int64)
    held = np.concatenate([np.flatnonzero(labels == label)[:HELDOUT_DIGITS] for label in range(10)])
    kept = np.setdiff1d(np.arange(len(labels)), held)
    sha256 = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    return FashionMNIST(images[kept], labels[kept], images[held], labels[held], sha256)


@dataclass(frozen=True, eq=False)
class Domain:
    """New classes, their images, and who judges them. `first`: the judge's number of the first class."""

    classes: tuple[str, ...]
    split: DataSplit
    network: Classifier
    first: int
    real: Pixels

    @cached_property
    def reference(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return gaussian_of(embed(self.network, self.real)[0].double().numpy())

    @cached_property
    def judge_sha256(self) -> str:
        weights = b"".join(tensor.float().numpy().tobytes() for tensor in self.network.state_dict().values())
        return hashlib.sha256(weights + self.real.tobytes()).hexdigest()

    def figures(self, pixels: Pixels, labels: NDArray[np.int64]) -> dict[str, float]:
        """Of images uint8 [n, 28, 28] that should show `labels` [n], counted from 0."""
        features, logits = embed(self.network, pixels)
        seen = logits.argmax(1).numpy() == labels + self.first
        worst = min(float(seen[labels == label].mean()) for label in np.unique(labels))
        distance = frechet_distance(*self.reference, *gaussian_of(features.double().numpy()))
        return {"frechet": distance, "class_accuracy": float(seen.mean()), "worst_class_accuracy": worst}


def open_domain(name: str) -> Domain:
    if name == "near":
        data = load_fashion_mnist()
        split = fashion_mnist_split(data, 50).of_classes(NEW)
        real = data.train_images[data.train_labels >= len(OLD)]
        return Domain(NEW, split, Judge.load()._network, len(OLD), real)
    data = digits()
    parts = [
        in_memory(images[:, None], torch.from_numpy(labels), DIGITS, data.data_sha256)
        for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels))
    ]
    network = train_classifier(data, seed=0, epochs=JUDGE_EPOCHS)
    return Domain(DIGITS, DataSplit(*parts, {"kind": "scikit-learn digits"}), network, 0, data.train_images)


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How long everything takes: images of the first training, of the second, and images that are judged."""

    before: int = BEFORE_IMAGES
    images: int = IMAGES
    judged: int = JUDGED_IMAGES


def trained_before(folder: Path, kind: str, size: Size, seed: int) -> Path:
    """The model of seven classes, trained unless it lies there already."""
    spec = SPEC if kind == "kind" else dataclasses.replace(SPEC.dense(), label_embedding=True)
    config = TrainConfig(spec, images=size.before, seed=seed, nested_share=0.0)
    place = folder / "weights" / f"before-{kind}-{size.before}-seed{seed}"
    if not (place / CONFIG).exists():
        split = fashion_mnist_split(load_fashion_mnist(), 50).of_classes(OLD)
        place.mkdir(parents=True, exist_ok=True)
        train_stages(config, split, place, resume=(place / STATE).exists(), on_progress=_tell)
    return place


@dataclass(frozen=True, eq=False)
class Trained:
    """A model that draws the new classes, numbered from `first`; `null` is its label without a class."""

    model: DiT
    first: int
    null: int
    figures: dict[str, Any]


def with_tailors(source: Checkpoint, domain: Domain, far: bool, size: Size, seed: int, place: Path) -> Trained:
    request = Request(source, domain.classes, learngene_only=far)
    config = adapt_config(request, "files", size.images, seed)
    resume = (place / STATE).exists()
    adapt_to(request, config, domain.split, place, device=CPU, resume=resume, on_progress=_tell)
    done = load_checkpoint(place)
    own = start_from(config, begin(request, config, None))
    figures = {
        "trainable_parameters": done.provenance["adapted"]["trained_values"],
        "train_flops_per_image": train_flops(config, own, domain),
        "train_seconds": done.provenance["adapted"]["seconds"],
    }
    return Trained(done.model(), len(request.kept), done.spec.num_classes, figures)


def with_weights(source: Checkpoint, domain: Domain, method: str, size: Size, seed: int, place: Path) -> Trained:
    """LoRA, full fine-tuning, or from scratch: an ordinary model of the new classes alone."""
    config = TrainConfig(
        dataclasses.replace(source.spec, num_classes=len(domain.classes)),
        "files",
        images=size.images,
        learning_rate=1.5e-3 * (FULL_RATE_SHARE if method == "full" else 1),
        warmup_steps=WARMUP_STEPS,
        seed=seed,
    )
    model = initialise(DiT(config.spec), seed) if method == "scratch" else _relabelled(source, config)
    if method == "lora":
        model = _with_lora(model, seed)
    choices = {"method": method}
    begun = (place / STATE).exists()
    place.mkdir(parents=True, exist_ok=True)
    state = load_state(place, config, None, model, choices) if begun else start_from(config, model)
    flops = train_flops(config, state, domain)
    run(config, state, domain.split.training, lambda s: save_state(place, config, s, choices), _tell)
    null_row = config.spec.width if method == "lora" else 0  # it lies in the same tensor, and is trained, too
    count = sum(parameter.numel() for parameter in state.parameters().values())
    with torch.no_grad():
        for name, parameter in state.parameters().items():
            parameter.copy_(state.average[name])
    figures = {
        "trainable_parameters": count - null_row,
        "train_flops_per_image": flops,
        "train_seconds": round(state.seconds, 1),
    }
    return Trained(state.model.eval().requires_grad_(False), 0, config.spec.num_classes, figures)


def _relabelled(source: Checkpoint, config: TrainConfig) -> DiT:
    """The trained ordinary model, with label rows of the new classes, which start as the null row."""
    model = DiT(config.spec)
    tensors = {name: tensor.float() for name, tensor in source.tensors.items()}
    tensors["y_embed.weight"] = tensors["y_embed.weight"][-1:].repeat(config.spec.num_classes + 1, 1)
    model.load_state_dict(tensors)
    return model


def lora_rank(spec: ModelSpec) -> int:
    """Its adapter has r (n + m) values per matrix; so does a tailor, and there is one per class (and its s)."""
    return SPEC.tailor_rank * spec.num_classes


def _with_lora(model: DiT, seed: int) -> DiT:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError("the method lora needs peft: pip install peft") from error
    assert model.y_embed is not None
    names, rank = [shape.name for shape in model.spec.matrices()], lora_rank(model.spec)
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)
    model.y_embed.weight.requires_grad_(True)
    return model


def train_flops(config: TrainConfig, state: TrainState, domain: Domain) -> int:
    """Forward and backward pass of one image, counted by PyTorch: 2 per multiply-accumulate of every product."""
    count = config.batch_size - config.batch_size % len(domain.classes)
    labels = torch.arange(len(domain.classes)).repeat_interleave(count // len(domain.classes))
    members = torch.stack([(domain.split.training.labels == label).nonzero()[0, 0] for label in labels.tolist()])
    batch = Batch(members, labels, count // len(domain.classes))
    noised = Noised.draw(config, 0, (count, *domain.split.training.shape))
    with _flop_counter() as counter:
        part_loss(config, state, domain.split.training, batch, noised, slice(0, count)).backward()
    for parameter in state.model.parameters():
        parameter.grad = None
    return round(counter.get_total_flops() / count)


def _flop_counter() -> FlopCounterMode:
    """PyTorch's, which by itself does not count products that are added in place."""

    def flops(_: Any, a: tuple[int, ...], b: tuple[int, ...], **__: Any) -> int:
        return 2 * math.prod(a) * b[-1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: flops})


@torch.no_grad()
def image_flops(trained: Trained) -> int:
    """One evaluation at batch 1, adapters apart from what they adapt, as they are trained."""
    spec = trained.model.spec
    x = torch.zeros(1, spec.channels, spec.image_size, spec.image_size)
    with _flop_counter() as counter:
        trained.model(x, torch.zeros(1), torch.tensor([trained.first]))
    return int(counter.get_total_flops())


@torch.no_grad()
def drawn(trained: Trained, count: int, seed: int) -> tuple[Pixels, NDArray[np.int64]]:
    """Images uint8 [n, 28, 28] of the new classes in equal shares, and which class, counted from 0."""
    spec, classes = trained.model.spec, trained.null - trained.first
    labels = torch.arange(count).remainder(classes).sort().values
    stream, denoise = torch.Generator().manual_seed(seed), guided(trained.model, GUIDANCE, trained.null)
    parts = []
    for part in labels.split(BATCH):
        noise = torch.randn(len(part), spec.channels, spec.image_size, spec.image_size, generator=stream)
        parts.append(sample(denoise, noise, part + trained.first, spec.objective, STEPS).clamp(-1, 1)[:, 0])
    return ((torch.cat(parts) + 1) * 127.5).round().to(torch.uint8).numpy(), labels.numpy()


def _tell(progress: Progress) -> None:
    if progress.step % 100 == 0:
        left = f"{progress.left_s:.0f} s left"
        print(
            f"step {progress.step} of {progress.steps}, loss {progress.loss:.4f}, {left}", file=sys.stderr, flush=True
        )


# --- the study --------------------------------------------------------------------------------------------------------


def study(
    folder: Path, size: Size, seeds: Sequence[int], domains: Sequence[str] = DOMAINS, methods: Sequence[str] = METHODS
) -> list[Record]:
    """Every run, seed by seed; finished ones are only read, begun ones gone on with."""
    opened = {name: open_domain(name) for name in domains}
    records = []
    for seed in seeds:
        for name, domain in opened.items():
            records.append(_real(folder, name, domain, size, seed))
            records += [_run(folder, name, domain, method, size, seed) for method in methods]
    return records


def _conditions(name: str, domain: Domain, method: str, size: Size, seed: int) -> dict[str, Any]:
    sampling = {"steps": STEPS, "guidance": GUIDANCE, "judge_sha256": domain.judge_sha256}
    return {"domain": name, "method": method, "seed": seed, **dataclasses.asdict(size), **sampling}


def _real(folder: Path, name: str, domain: Domain, size: Size, seed: int) -> Record:
    """What held-out images of the new classes score: the best that can be hoped for."""
    held = domain.split.heldout
    pixels = held.stored(torch.arange(len(held.labels)))[:, 0].numpy()
    store = Store(folder, NAME, subject_of(trained_before(folder, "kind", size, seed)))
    conditions = _conditions(name, domain, "real", size, seed)
    return store.run(f"{name}-real-seed{seed}", conditions, lambda: domain.figures(pixels, held.labels.numpy()))


def _run(folder: Path, name: str, domain: Domain, method: str, size: Size, seed: int) -> Record:
    before = trained_before(folder, "kind" if method == "kind" else "dense", size, seed)
    place = folder / "weights" / f"{name}-{method}-{size.before}-{size.images}-seed{seed}"
    train = partial(with_tailors, far=name == "far") if method == "kind" else partial(with_weights, method=method)

    def compute() -> dict[str, Any]:
        trained = train(load_checkpoint(before), domain, size=size, seed=seed, place=place)
        figures = domain.figures(*drawn(trained, size.judged, seed))
        return {**figures, **trained.figures, "flops": image_flops(trained)}

    store = Store(folder, NAME, subject_of(before))
    return store.run(f"{name}-{method}-seed{seed}", _conditions(name, domain, method, size, seed), compute)


def table(records: Sequence[Record]) -> str:
    """Mean and range over the seeds; one row per domain and method."""
    header = (
        "new classes", "method", "trained (K)", "training (MFLOPs an image)", "training (s)", "evaluation (MFLOPs)",
        "Fréchet distance", "class accuracy", "worst class",
    )  # fmt: skip
    rows = []
    for domain in DOMAINS:
        for method in (*METHODS, "real"):
            wanted = {"domain": domain, "method": method}
            own = [record for record in records if wanted.items() <= record["conditions"].items()]
            if own:
                work = (
                    cell(own, key, digits, scale)
                    for key, digits, scale in (
                        ("trainable_parameters", 1, 1e-3), ("train_flops_per_image", 1, 1e-6), ("train_seconds", 0, 1),
                        ("flops", 1, 1e-6),
                    )
                )  # fmt: skip
                shares = (cell(own, key, 1, 100, " %") for key in ("class_accuracy", "worst_class_accuracy"))
                rows.append((domain, method, *work, cell(own, "frechet", 1), *shares))
    sizes = {tuple(record["conditions"][key] for key in ("before", "images", "judged")) for record in records}
    told = "; ".join(f"{b:,} images before, {i:,} of the new classes, {j:,} judged" for b, i, j in sorted(sizes))
    return (
        f"{markdown(header, rows)}\n\n{told}; {STEPS} steps, guidance {GUIDANCE}; "
        "LoRA is evaluated apart from what it adapts: merged, it costs what full fine-tuning costs."
    )

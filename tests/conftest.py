"""What holds for every test: one thread per process, no deadlines on shared cores, and one tiny model for all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports torch or ONNX Runtime: test processes with a pool of threads each only fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from kind_edge.model.checkpoint import Checkpoint

settings.register_profile("kind-edge", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("kind-edge")

TINY: dict[str, Any] = {
    "image_size": 8, "channels": 1, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 4,
    "learngene_rank": 6, "tailor_rank": 2,
}  # fmt: skip
TINY_CLASSES = (
    "sneaker", "bag", "coat", "shirt", "dress", "t-shirt", "trouser", "pullover", "sandal", "ankle-boot",
)  # fmt: skip
"""The first `num_classes` of them, four unless told otherwise; ten are those of the shipped model."""

DISTILLED: dict[str, Any] = {"step_counts": (1, 2, 4), "inside_guidance": 1.75}


def tiny_checkpoint(seed: int = 0, **overrides: Any) -> Checkpoint:
    """A model of TINY's shape (or of `overrides`) in float32, with no weight at zero.

    A fresh model would not do: its adaLN and final layers are zero, so it predicts zero whatever else is wrong.
    """
    import torch

    from kind_edge.model.checkpoint import Checkpoint
    from kind_edge.model.dit import DiT, initialise
    from kind_edge.model.spec import ModelSpec

    spec = ModelSpec(**{**TINY, **overrides})
    model = initialise(DiT(spec), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    provenance: dict[str, Any] = {"recommended": {"steps": 4, "guidance": 1.5}}
    if spec.distilled:
        provenance = {
            "recommended": {"steps": 4, "guidance": spec.inside_guidance, "sampler": "euler"},
            "distilled": {"teacher_sha256": "ab" * 32, "teacher_steps": 20, "teacher_guidance": spec.inside_guidance},
            "quality_by_steps": {"4": {"frechet": 5.25, "class_accuracy": 0.985, "images": 10_000, "seed": 1}},
        }
    provenance |= {"stated": {"licence": "CC0-1.0"}, "data": {"kind": "Fashion-MNIST"}}
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Checkpoint(spec, TINY_CLASSES[: spec.num_classes], tensors, provenance)


def save_tiny(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """`tiny_checkpoint` as `train` and a first plan would leave it: in fp16, with calibration, eight held-out images of
    every class, and sensitivity, of few inputs."""
    import torch

    from kind_edge.deploy.probe import measure_sensitivity
    from kind_edge.deploy.sensitivity_file import keep_sensitivity
    from kind_edge.model.calibration import calibrate_on_images, save_calibration
    from kind_edge.model.checkpoint import (
        CALIBRATION,
        HELDOUT,
        checkpoint_hash,
        load_checkpoint,
        save_checkpoint,
        write_tensors,
    )  # fmt: skip

    checkpoint = tiny_checkpoint(seed, **overrides)
    spec = checkpoint.spec
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(8 * spec.num_classes) % spec.num_classes
    shape = (len(labels), spec.channels, spec.image_size, spec.image_size)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    heldout = {"images": images}
    if spec.pixels_per_latent > 1:
        heldout = {"latents": torch.randn(shape, generator=generator).half()}
    save_checkpoint(folder, checkpoint, torch.float16)
    stored = load_checkpoint(folder)
    calibration = calibrate_on_images(stored.model(), images.float() / 127.5 - 1, labels)
    save_calibration(folder / CALIBRATION, calibration)
    keep_sensitivity(measure_sensitivity(stored, checkpoint_hash(folder), calibration, images=4), folder)
    write_tensors(folder / HELDOUT, {**heldout, "labels": labels.to(torch.uint8)})
    return folder


def random_dit(**overrides: Any) -> Any:
    """A small `DiTTransformer2DModel` of 3 classes with random weights, biases included.

    The embedders of all blocks are alike, as a trained DiT has them.
    """
    import torch
    from diffusers import DiTTransformer2DModel

    config: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**{**config, **overrides}).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.fixture(scope="session")
def make_dit() -> Callable[..., Any]:
    return random_dit


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Checkpoint]:
    return tiny_checkpoint


@pytest.fixture(scope="session")
def make_checkpoint_folder() -> Callable[..., Path]:
    return save_tiny


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: a folder that `make` fills, once for all test processes; tests only read it."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / f"once-{name}"
        with open(root / f"once-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                unfinished = root / f"once-{name}.unfinished-{os.getpid()}"
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return once


@pytest.fixture(scope="session")
def tiny_folder(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A checkpoint folder of TINY's shape with calibration and held-out images. Only to be read."""
    return made_once("tiny", save_tiny)


def export_both(tiny_folder: Path, output: Path) -> None:
    """Two classes, cut to 60 % of the dense model's work; what `export --json` prints goes beside the bundle."""
    import json

    from kind_edge.deploy import pipeline

    stages: list[str] = []
    asked: dict[str, Any] = {"profile": "raspberry-pi-5", "classes": ["shirt", "bag"], "max_flops": "60%"}
    bundle = pipeline.export(tiny_folder, **asked, output=output / "b", on_stage=stages.append)
    assert ", ".join(stages) == (
        "reading the model, planning, merging, exporting, verifying, measuring, drawing the preview, writing the report"
    )
    (output / "export.json").write_text(json.dumps(bundle.to_dict()))


@pytest.fixture(scope="session")
def exported_bundle(tiny_folder: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A folder with the bundle `b` of the tiny model, and `export.json`. Only to be read."""
    return made_once("bundle", lambda folder: export_both(tiny_folder, folder))


@pytest.fixture(scope="session")
def distilled_folder(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The same with a model that is distilled for 1, 2 and 4 steps, with guidance 1.75 inside. Only to be read."""
    return made_once("distilled", lambda folder: save_tiny(folder, **DISTILLED))


@pytest.fixture(scope="session")
def autoencoders(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Random AutoencoderKL and AutoencoderTiny in kl/ and tiny/: 8 pixels per latent, 4 channels. Only to be read."""

    def make(folder: Path) -> None:
        import diffusers
        import torch

        torch.manual_seed(0)
        widths = (4, 4, 4, 4)
        kl = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=widths,
            norm_num_groups=2,
            latent_channels=4,
            scaling_factor=0.5,
            shift_factor=0.25,
        )
        kl.save_pretrained(folder / "kl")
        tiny = diffusers.AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
        with torch.no_grad():  # untrained, it would draw black on black
            tiny.decoder.layers[-1].weight.mul_(8)
            tiny.decoder.layers[-1].bias.fill_(0.5)
        tiny.save_pretrained(folder / "tiny")

    return made_once("autoencoders", make)


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder, by path with forward slashes."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read


@pytest.fixture(scope="session")
def fashion_folder() -> Path:
    """Where the images of Fashion-MNIST lie."""
    from kind_edge.errors import InputError
    from kind_edge.training.data import find_fashion_mnist

    try:
        return find_fashion_mnist()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def parse_swift() -> Callable[[str], Any]:
    """The syntax tree of Swift source; what is no Swift fails here."""
    import tree_sitter
    import tree_sitter_swift

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))

    def parse(source: str) -> Any:
        root = parser.parse(source.encode()).root_node
        unknown = [node for node in descendants(root) if node.is_error or node.is_missing]
        assert not unknown, [(node.start_point, node.text) for node in unknown]
        return root

    return parse


def descendants(node: Any) -> Iterator[Any]:
    """A node of a syntax tree and all below it."""
    yield node
    for child in node.children:
        yield from descendants(child)

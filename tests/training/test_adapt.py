"""New classes leave everything else alone, to the byte; what comes out plans like any other checkpoint."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.pipeline import plan as make_plan
from kind_edge.deploy.reference import load_heldout
from kind_edge.errors import InputError, UsageError
from kind_edge.model.calibration import Calibration, load_calibration
from kind_edge.model.checkpoint import CALIBRATION, CONFIG, HELDOUT, load_checkpoint, read_tensors, save_checkpoint
from kind_edge.model.resize import resized, target_spec
from kind_edge.training.adapt import adapt, adapt_config, adapt_to
from kind_edge.training.data import DataSplit, in_memory
from kind_edge.training.joined import mix
from kind_edge.training.loop import Progress
from kind_edge.training.newcomers import NEAREST, Request, begin, origins_of
from kind_edge.training.state import STATE

OLD, NEW = ("sneaker", "bag", "coat", "shirt"), ("dog", "cat")
IMAGES = 6 * 120


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_png: Callable[..., bytes]) -> Path:
    """Three classes: cat and dog, which are wanted, and eel, which is not."""
    root = tmp_path_factory.mktemp("data")
    for label, name in enumerate(("cat", "dog", "eel")):
        (root / name).mkdir()
        for number in range(20):
            (root / name / f"{number}.png").write_bytes(make_png(100 * label + number))
    return root


@pytest.fixture(scope="module", params=[False, True], ids=["gate alone", "label embedding"])
def source(request: Any, tmp_path_factory: pytest.TempPathFactory, make_checkpoint_folder: Callable[..., Path]) -> Path:
    return make_checkpoint_folder(tmp_path_factory.mktemp("source") / "model", label_embedding=request.param)


@pytest.fixture(scope="module")
def adapted(source: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interrupted after three steps of six and resumed."""

    def interrupt(progress: Progress) -> None:
        if progress.step == 3:
            signal.raise_signal(signal.SIGINT)

    folder = tmp_path_factory.mktemp("adapted") / "model"
    with pytest.raises(KeyboardInterrupt):
        adapt(source, images, NEW, folder, images=IMAGES, device="cpu", on_progress=interrupt)
    assert [path.name for path in folder.iterdir()] == [STATE]
    with pytest.raises(UsageError, match=r"start was None, now 'bag'"):
        adapt(source, images, NEW, folder, images=IMAGES, start="bag", device="cpu", resume=True)
    other = shutil.copytree(images, folder.parent / "other")
    (other / "cat" / "0.png").unlink()
    with pytest.raises(UsageError, match=r"started otherwise: data_sha256 was"):
        adapt(source, other, NEW, folder, images=IMAGES, device="cpu", resume=True)
    with pytest.raises(UsageError, match=r"images was 720, now 60;"):
        adapt(source, other / "nowhere", NEW, folder, images=60, device="cpu", resume=True)
    return adapt(source, images, NEW, folder, images=IMAGES, device="cpu", resume=True)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "model.safetensors")


def test_only_new_rows_are_new(source: Path, adapted: Path) -> None:
    old, new = stored(source), stored(adapted)
    assert load_checkpoint(adapted).class_names == OLD + NEW
    grown = {name for name in old if ".tailors." in name} | ({"y_embed.weight"} & set(old))
    for name, tensor in old.items():
        assert new[name].dtype == tensor.dtype, name
        if name not in grown:
            assert torch.equal(new[name], tensor), name
        else:
            assert torch.equal(new[name][:4], tensor[:4]), name
            assert len(new[name]) == len(tensor) + 2, name
    if "y_embed.weight" in old:
        assert torch.equal(new["y_embed.weight"][-1], old["y_embed.weight"][-1])
    trained = {name.partition(".")[2] for name in read_tensors(adapted / STATE) if name.startswith("model.")}
    assert trained == {"y_embed.weight"} & set(old)
    begun = begun_with(source)
    for name in grown:
        assert not torch.isclose(new[name][4:6].float(), begun[name][:2], atol=1e-4).all(), f"{name} did not learn"


@pytest.mark.parametrize(("size", "method"), [((1, 16), "front"), ((3, 24), "bot")])
def test_a_resized_model_takes_new_classes_and_leaves_the_old_as_they_are(
    tiny_folder: Path, images: Path, tmp_path: Path, size: tuple[int, int], method: str
) -> None:
    """The old are drawn bit for bit as by the resized model; the new ones have tailors of their own."""
    whole = load_checkpoint(tiny_folder)
    save_checkpoint(tmp_path / "sized", resized(whole, target_spec(whole.spec, *size), method))
    grown = adapt(tmp_path / "sized", images, NEW, tmp_path / "grown", images=IMAGES, device="cpu")
    before, after = load_checkpoint(tmp_path / "sized"), load_checkpoint(grown)
    assert after.spec == dataclasses.replace(before.spec, num_classes=6)
    assert after.provenance["resized"] == before.provenance["resized"]
    stream = torch.Generator().manual_seed(0)
    x, t = torch.randn(10, 1, 8, 8, generator=stream), torch.rand(10, generator=stream) * 1000
    classes = torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 1, 0])
    old, new = before.model()(x, t, classes), after.model()
    assert torch.equal(old, new(x, t, torch.where(classes == 4, 6, classes)))
    dog, cat, null = (new(x, t, torch.full((10,), number)) for number in (4, 5, 6))
    assert not torch.isclose(dog, null).all()
    assert not torch.isclose(dog, cat).all()


def begun_with(source: Path, start: str | None = None) -> dict[str, torch.Tensor]:
    request = Request(load_checkpoint(source), NEW, start)
    origins = None if start is None else (start, start)
    return dict(begin(request, adapt_config(request, "files", IMAGES), origins).state_dict())


def test_old_classes_are_drawn_bit_for_bit_as_before(source: Path, adapted: Path) -> None:
    old, new = load_checkpoint(source).model(), load_checkpoint(adapted).model()
    stream = torch.Generator().manual_seed(0)
    x, t = torch.randn(10, 1, 8, 8, generator=stream), torch.rand(10, generator=stream) * 1000
    classes = torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 1, 0])
    assert torch.equal(old(x, t, classes), new(x, t, torch.where(classes == 4, 6, classes)))


@pytest.mark.parametrize("form", ["single", "switch"])
def test_old_classes_deploy_bit_for_bit_as_before(source: Path, adapted: Path, form: str) -> None:
    classes = ["coat"] if form == "single" else ["coat", "bag"]
    plan = make_plan(adapted, profile="snapdragon8g3", classes=classes, form=form, steps=4, precision="fp32")
    network = dataclasses.replace(plan, modulation="network")
    timesteps = torch.tensor([1000.0, 500.0])
    parts = []
    for folder in (source, adapted):
        calibration = load_calibration(source / CALIBRATION, load_checkpoint(source).spec)
        cut = truncate(load_checkpoint(folder), network, calibration)
        parts.append((cut.tensors, fold(cut, network, timesteps).state_dict()))
    for before, after in zip(*parts, strict=True):
        assert set(before) == set(after)
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), name


def test_a_resumed_run_is_the_same_run(source: Path, adapted: Path, images: Path, tmp_path: Path) -> None:
    whole = adapt(source, images, NEW, tmp_path / "whole", images=IMAGES, device="cpu")
    for file in ("model.safetensors", CALIBRATION, HELDOUT):
        assert (whole / file).read_bytes() == (adapted / file).read_bytes(), file
    tensors = read_tensors(whole / STATE)
    for name, tensor in read_tensors(adapted / STATE).items():
        assert torch.equal(tensor, tensors[name]), name


def test_what_planning_needs_covers_old_and_new(source: Path, adapted: Path) -> None:
    spec = load_checkpoint(adapted).spec
    heldout, before = load_heldout(adapted, spec), load_heldout(source, load_checkpoint(source).spec)
    assert heldout is not None
    assert before is not None
    assert heldout.labels.bincount().tolist() == [8, 8, 8, 8, 2, 2]
    assert torch.equal(heldout.images[:32], before.images)
    load_calibration(adapted / CALIBRATION, spec)
    plan = make_plan(adapted, profile="snapdragon8g3", classes=["dog", "coat"], max_flops="60%", steps=4)
    assert plan.classes == ("dog", "coat")


def test_every_class_has_the_same_part_in_the_covariances() -> None:
    old, new = ({"m": torch.full((2, 2), value)} for value in (1.0, 4.0))
    mixed = mix(Calibration(old, new, "old"), Calibration(new, old, "new"), (4, 2))
    assert (float(mixed.pooled["m"][0, 0]), float(mixed.null["m"][0, 0])) == pytest.approx((2.0, 3.0))


def test_a_new_domain_keeps_the_learngene_alone(source: Path, images: Path, tmp_path: Path) -> None:
    folder = adapt(source, images, ["cat"], tmp_path / "new", learngene_only=True, images=120, device="cpu")
    old, new = stored(source), stored(folder)
    assert load_checkpoint(folder).class_names == ("cat",)
    for name, tensor in old.items():
        if ".tailors." not in name and name != "y_embed.weight":
            assert torch.equal(new[name], tensor), name
    heldout = load_heldout(folder, load_checkpoint(folder).spec)
    assert heldout is not None
    assert heldout.labels.unique().tolist() == [0]
    assert make_plan(folder, profile="snapdragon8g3", steps=4).classes == ("cat",)


def test_a_fresh_tailor_starts_as_nothing(source: Path) -> None:
    request = Request(load_checkpoint(source), NEW)
    model, old = begin(request, adapt_config(request, "files", IMAGES), None), request.source.model()
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10.0, 500.0, 990.0])
    drawn = model(x, t, torch.tensor([0, 1, 2])).detach()
    torch.testing.assert_close(drawn, old(x, t, torch.tensor([4, 4, 4])), atol=1e-6, rtol=1e-5)


def test_a_tailor_may_start_as_another(source: Path) -> None:
    begun, old = begun_with(source, "coat"), stored(source)
    for name, tensor in begun.items():
        if ".tailors." in name or name == "y_embed.weight":
            assert torch.equal(tensor[:2], old[name][[2, 2]].float()), name


def test_a_class_that_is_called_nearest_is_meant_by_its_name(source: Path) -> None:
    named = dataclasses.replace(load_checkpoint(source), class_names=("sneaker", "bag", "coat", NEAREST))
    nothing: Any = None  # no image is looked at
    assert origins_of(Request(named, NEW, NEAREST), nothing) == (NEAREST, NEAREST)


def test_what_a_tailor_has_learned_makes_it_the_nearest(
    tmp_path: Path, make_checkpoint_folder: Callable[..., Path]
) -> None:
    stream = torch.Generator().manual_seed(0)
    pixels = torch.randint(40, (24, 1, 8, 8), generator=stream) + 200 * (torch.arange(24) % 2).view(-1, 1, 1, 1)
    data = in_memory(pixels.to(torch.uint8).numpy(), torch.arange(24) % 2, ("dark", "bright"), "0")
    request = Request(load_checkpoint(make_checkpoint_folder(tmp_path / "model")), data.class_names)
    config = adapt_config(request, "files", 12 * 60)
    config = dataclasses.replace(config, batch_size=12, learning_rate=1e-2, warmup_steps=5)
    losses: list[float] = []
    folder = adapt_to(
        request,
        config,
        DataSplit(data, data.of_classes(["dark"])),
        tmp_path / "out",
        device=torch.device("cpu"),
        on_progress=lambda progress: losses.append(progress.loss),
    )
    assert losses[-1] < losses[0]
    again = Request(load_checkpoint(folder), ("day", "night"), NEAREST)
    swapped = dataclasses.replace(data, labels=1 - data.labels, class_names=again.classes)
    assert origins_of(again, swapped) == ("bright", "dark")


def test_what_cannot_be_is_refused_before_any_work(
    source: Path, images: Path, tmp_path: Path, make_checkpoint_folder: Callable[..., Path]
) -> None:
    plain = make_checkpoint_folder(tmp_path / "plain", tailor_rank=0)
    colour = make_checkpoint_folder(tmp_path / "colour", channels=2)
    few = make_checkpoint_folder(tmp_path / "few", step_counts=(1, 4), inside_guidance=1.5)
    same = tmp_path / "map.toml"
    same.write_text('bag = ["cat"]')
    refused: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("unknown class of the data 'catt'; did you mean: cat", (source, images, ["catt"]), {}),
        ("knows 'bag' already", (source, images, ["bag"]), {"class_map": same}),
        ("named twice", (source, images, ["cat", "cat"]), {}),
        ("at least one class", (source, images, []), {}),
        (
            r"unknown class 'cota'; did you mean: coat\? Or give --from nearest",
            (source, images, ["cat"]),
            {"start": "cota"},
        ),
        ("has no tailors", (plain, images, ["cat"]), {}),
        ("is distilled, .* adapt the model that it was distilled from", (few, images, ["cat"]), {}),
        ("the model has 2 channels", (colour, images, ["cat"]), {}),
        ("works on pixels", (source, images, ["cat"]), {"autoencoder": tmp_path}),
    ]
    for message, arguments, choices in refused:
        with pytest.raises(UsageError, match=message):
            adapt(*arguments, tmp_path / "out", device="cpu", **choices)
    with pytest.raises(InputError, match="no such file or folder"):
        adapt(source, tmp_path / "nowhere", ["cat"], tmp_path / "out", device="cpu")
    (images.parent / "fashion").mkdir(exist_ok=True)
    (images.parent / "fashion" / "train-images-idx3-ubyte.gz").write_bytes(b"")
    with pytest.raises(UsageError, match="image_size 8, Fashion-MNIST has 28"):
        adapt(source, images.parent / "fashion", ["dress"], tmp_path / "out", device="cpu")
    with pytest.raises(UsageError, match="not empty"):
        adapt(source, images, ["cat"], source, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_corrupt_checkpoint_is_refused_before_any_work(
    images: Path, tmp_path: Path, make_checkpoint_folder: Callable[..., Path]
) -> None:
    folder = make_checkpoint_folder(tmp_path / "model")
    for file in (HELDOUT, CALIBRATION, "model.safetensors", CONFIG):
        (folder / file).write_bytes((folder / file).read_bytes()[:-5])
        with pytest.raises(InputError):
            adapt(folder, images, ["cat"], tmp_path / "out", device="cpu")
        assert not (tmp_path / "out").exists()

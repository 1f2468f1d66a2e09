"""What a plan says of Core ML packages: that its figures are those of the model, and what refuses it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kind_edge.budget.coreml import Packaging, coreml_estimate
from kind_edge.budget.coreml_weights import TARGETS, WEIGHTS, stored_bytes
from kind_edge.budget.loss import LossModel, MatrixLoss
from kind_edge.budget.plan import Plan
from kind_edge.budget.planner import make_plan
from kind_edge.budget.problem import Candidate, Deployment, Request, Sampling, Source
from kind_edge.budget.profile import Figure, Store, load_profile
from kind_edge.budget.profile_file import parse_profile
from kind_edge.budget.profile_text import profile_text
from kind_edge.deploy.coreml_plan import Packages
from kind_edge.errors import InputError, NoPlanError
from kind_edge.model.spec import ModelSpec
from kind_edge.units import Quantity, format_bytes, parse_quantity

APPLE, ANDROID = load_profile("apple-a18"), load_profile("snapdragon8g3")
CLASSES = ("cat", "dog", "owl")
SAMPLING = Sampling("euler", 4, 1.0, 4)
SPEC = ModelSpec(
    image_size=28, patch_size=4, channels=1, width=256, depth=4, heads=4, num_classes=3, factored=True,
    learngene_rank=64, tailor_rank=4,
)  # fmt: skip


def source(spec: ModelSpec = SPEC, power: int = 1) -> Source:
    """Where every rank less costs the same, or ever more with a higher `power`."""

    def losses(form: str, classes: tuple[str, ...]) -> LossModel:
        def falling(rank: int) -> Any:
            return 0.01 * np.linspace(1, 0, rank + 1) ** power

        matrices = {
            m.name: MatrixLoss(falling(spec.ranks(m.name).learngene), falling(spec.ranks(m.name).tailor), 1e-4)
            for m in spec.matrices()
        }
        return LossModel(matrices, dict.fromkeys(spec.branches(), 1.0))

    return Source("made", "ab" * 32, spec, losses, "plain", "none")


@pytest.fixture(scope="module")
def plan() -> Callable[..., Plan]:
    def make(profile: Any = APPLE, **asked: Any) -> Plan:
        return make_plan(source(), Request(profile, CLASSES, SAMPLING, "switch", **asked))

    return make


def test_every_figure_of_a_package_is_in_the_plan(plan: Callable[..., Plan]) -> None:
    made = plan(precision="fp16", unit="gpu")
    assert not plan(ANDROID).coreml, "no Core ML reaches it"
    found = dict(made.coreml)
    assert (found["mark"], found["weights"], found["target"], found["layout"]) == ("E", "fp16", "iOS18", "tokens")
    assert 2 * made.params <= found["denoiser_bytes"] <= 2.05 * made.params
    assert found["app_bytes"] == found["denoiser_bytes"] + found.get("decoder_bytes", 0)
    assert found["gpu_sustained_image_latency_s"] == pytest.approx(made.sustained_image_latency_s)
    assert found["npu_image_latency_s"] <= found["npu_sustained_image_latency_s"]
    again = Plan.from_dict(made.to_dict(), "plan.json")
    assert again == made
    with pytest.raises(InputError, match="coreml: got"):
        Plan.from_dict({**made.to_dict(), "coreml": {"app_bytes": 7}}, "plan.json")


@settings(max_examples=40)
@given(st.sampled_from(TARGETS), st.sampled_from(WEIGHTS), st.integers(1, 4), st.integers(8, 300), st.integers(8, 300))
def test_smaller_weights_take_less_of_the_file(target: Any, weights: Any, kept: int, m: int, n: int) -> None:
    """Never less than their bits, and at most a header, a table and an alignment more than fp16."""
    bits = {"fp16": 16, "int8": 8, "int4": 4, "mixed": 4}.get(weights) or int(weights.removeprefix("palette"))
    for shape in ((n, m), (kept, m, 8), (n, m, 1, 1)):
        found = stored_bytes(shape, weights, target)
        assert math.prod(shape) * bits / 8 <= found <= 2 * math.prod(shape) + 2048


def test_what_a_store_takes_is_a_limit(plan: Callable[..., Plan]) -> None:
    figure = Figure(6e6, "P", "the store's own page")
    shop = dataclasses.replace(APPLE, store=Store("Shop", figure))
    assert "max_size" not in plan().limits, "no plan is as large as what the store takes"
    assert plan(shop).weight_bytes <= plan(shop).limits["max_size"] == 6e6
    assert (
        plan(dataclasses.replace(APPLE, store=Store("Shop", Figure(4e9, "P", "?"), figure))).limits == plan(shop).limits
    )
    tiny = dataclasses.replace(shop, store=Store("Shop", Figure(1e5, "P", "the store's own page")))
    with pytest.raises(
        NoPlanError, match=r"--max-size .* Shop allows an app no more \(the store's own page\)"
    ) as caught:
        plan(tiny)
    assert "raise --max-size" not in str(caught.value), "nobody can raise it"


def test_stored_plans_whose_packages_no_app_may_hold_are_refused(plan: Callable[..., Plan]) -> None:
    made = plan(precision="int8", unit="cpu")
    whole = Packages(source(), APPLE, {"weights": "fp16", "target": "iOS17"}).checked(made)
    assert (whole.coreml["weights"], whole.coreml["target"]) == ("fp16", "iOS17")
    assert Packages(source(), APPLE, None).checked(made) is made
    packs = {"weights": "fp16", "functions": (("one", ("cat",)), ("two", ("dog",)))}
    more = Packages(source(), APPLE, packs).checked(made).coreml["app_bytes"]
    assert whole.coreml["app_bytes"] < more < 1.2 * int(whole.coreml["app_bytes"]), "a program each, and no weights"
    size = int(whole.coreml["app_bytes"])
    small = dataclasses.replace(APPLE, store=Store("Shop", Figure(size - 1, "P", "its page")))
    told = r"Shop allows \(its page\); plan with --formats coreml; or take --coreml-weights .*; or keep fewer classes"
    with pytest.raises(NoPlanError, match=told):
        Packages(source(), small, {"weights": "fp16"}).checked(made)


SMALL = ModelSpec(
    image_size=8, patch_size=2, channels=1, width=64, depth=1, heads=2, num_classes=3, factored=True,
    learngene_rank=24, tailor_rank=4,
)  # fmt: skip
PACKAGES = st.fixed_dictionaries({
    "target": st.sampled_from(("iOS17", "iOS18")),
    "weights": st.sampled_from(("auto", "fp16", "palette6")),
    "layout": st.sampled_from(("auto", "channels")),
    "functions": st.sampled_from(((), (("one", ("cat",)),))),
})  # fmt: skip


@settings(max_examples=8)
@given(
    st.sampled_from(("apple-a18", "apple-m4", "snapdragon8g3")),
    st.sampled_from(("auto", "fp16", "int8")),
    st.booleans(),
    st.integers(40_000, 130_000),
    PACKAGES,
)
def test_a_plan_for_packages_fits_with_them_or_no_plan_does(
    name: str, precision: Any, of_store: bool, limit: int, choices: dict[str, Any]
) -> None:
    """Whoever sets the limit. What a refusal advises is enough; a plan that fits anyway stays as it is."""
    device, model = load_profile(name), source(SMALL, power=2)
    limits = {} if of_store else {"max_size": Quantity(limit, "bytes")}
    store = Store("Shop", Figure(limit, "P", "its page")) if of_store else None
    device = dataclasses.replace(device, store=store)
    packages = Packages(model, device, choices)
    request = Request(device, CLASSES, SAMPLING, "switch", precision, limits=limits)
    try:
        best = make_plan(model, request)
    except NoPlanError:
        with pytest.raises(NoPlanError):
            packages.best_plan(request)
        return
    found, told = outcome(packages, request)
    if found is None:
        assert f"more than the {format_bytes(limit)} that" in told
        assert ("raise --max-size" in told) is not of_store
        if of_store:
            return
        enough = parse_quantity(told.split("raise --max-size to at least ")[1].split(";")[0], "bytes")
        request, limit = dataclasses.replace(request, limits={"max_size": enough}), int(enough.value)
        found, best = packages.best_plan(request), make_plan(model, request)
    assert int(found.coreml["app_bytes"]) <= limit
    assert found.weight_bytes <= limit
    assert packages.checked(found) == found, "as export finds it"
    if coreml_size(packages, best) <= limit:
        assert found.matrices == best.matrices
    else:
        assert found.weight_bytes < best.weight_bytes


def outcome(packages: Packages, request: Request) -> tuple[Plan | None, str]:
    """The plan, or what is told instead."""
    try:
        return packages.best_plan(request), ""
    except NoPlanError as error:
        return None, str(error)


def coreml_size(packages: Packages, plan: Plan) -> int:
    """What the packages of a plan take, whoever allows how much."""
    unlimited = dataclasses.replace(packages, device=dataclasses.replace(packages.device, store=None))
    return int(unlimited.checked(dataclasses.replace(plan, limits={})).coreml["app_bytes"])


def test_profiles_say_what_their_store_takes() -> None:
    assert (APPLE.store.name, APPLE.store.model_bytes.value) == ("App Store", 4e9)  # type: ignore[union-attr]
    assert (ANDROID.store.app_bytes.value, ANDROID.store.model_bytes.value) == (4e9, 1.5e9)  # type: ignore[union-attr]
    assert load_profile("raspberry-pi-5").store is None
    figures = dict(ANDROID.figures())
    assert figures["store.pack_bytes"].mark == figures["store.app_bytes"].mark == "P"
    assert parse_profile(profile_text(ANDROID), ANDROID.name, "again").store == ANDROID.store


def test_the_layout_and_weights_follow_the_plan() -> None:
    request = Request(APPLE, CLASSES, SAMPLING, "switch")
    matrices = make_plan(source(), request).matrices
    deployment = Deployment(SPEC, request, Candidate("switch", "fp16", "npu"))
    assert coreml_estimate(deployment, matrices)["layout"] == "channels"
    narrow = coreml_estimate(deployment, matrices, Packaging("iOS16", "palette4", "tokens"))
    assert narrow["app_bytes"] < 0.4 * int(
        coreml_estimate(deployment, matrices, Packaging(weights="fp16"))["app_bytes"]
    )

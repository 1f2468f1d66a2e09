"""A step touches the tailors of its own classes alone, and what that means for AdamW and the average is ordinary."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kind_edge.model.diffusion import loss_per_image
from kind_edge.model.dit import DiT, initialise
from kind_edge.model.gated_linear import ClassGate
from kind_edge.model.spec import ModelSpec
from kind_edge.training.batches import ClassBatches
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import TrainingData, in_memory
from kind_edge.training.loop import Noised, learning_rate, train_step
from kind_edge.training.losses import NestedLoss
from kind_edge.training.state import TrainState, averaged_tensors, start
from kind_edge.training.tailors import BETAS, average_kept, decay_at

SPEC = ModelSpec(8, 1, 4, 16, 1, 2, 3, learngene_rank=4, tailor_rank=2)
CONFIG = TrainConfig(SPEC, images=12 * 12, batch_size=12, warmup_steps=2, weight_decay=0.1, gradient_clip=0.05)


def data_of(classes: int, per_class: int = 4) -> TrainingData:
    labels = torch.arange(classes * per_class) % classes
    images = torch.randint(256, (len(labels), 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return in_memory(images.numpy(), labels, tuple(str(c) for c in range(classes)), "0")


def with_classes(classes: int, **changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, spec=dataclasses.replace(SPEC, num_classes=classes), **changes)


def weights(state: TrainState) -> dict[str, Tensor]:
    return {**state.parameters(), **dict(state.tailors.layout.views(state.tailors.weight))}


@pytest.mark.parametrize("changes", [{}, {"label_embedding": True}, {"tailor_rank": 0}, {"factored": False}])
def test_with_every_class_in_every_batch_it_is_ordinary_adamw_and_ema(changes: dict[str, Any]) -> None:
    if changes == {"factored": False}:
        changes = {**changes, "learngene_rank": 0, "tailor_rank": 0}
    config = dataclasses.replace(CONFIG, spec=dataclasses.replace(SPEC, **changes))
    data, state = data_of(3), start(config)
    batches = ClassBatches(data.labels, 3, 12, config.seed)
    model = initialise(DiT(config.spec), config.seed)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name.endswith("bias") == bias], "weight_decay": 0.0 if bias else 0.1}
        for bias in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    for step in range(config.steps):
        batch, drawn = batches(step), Noised.draw(config, step, (12, 1, 8, 8))
        gate = ClassGate.grouped(torch.arange(3), drawn.closed, 3)
        x = data.batch(batch.images)
        loss = loss_per_image("flow", lambda x, t, gate=gate: model(x, t, gate), x, drawn.noise, drawn.timestep).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        for name, p in named:
            average[name].lerp_(p.detach(), 1 - decay_at(config.ema_decay, step))
        assert train_step(config, state, data, batches) == pytest.approx(float(loss.detach()), rel=1e-5)
    averaged = averaged_tensors(config, state)
    for name, p in named:
        torch.testing.assert_close(weights(state)[name], p, atol=1e-5, rtol=1e-4, msg=name)
        torch.testing.assert_close(averaged[name], average[name], atol=1e-5, rtol=1e-4, msg=name)


def test_an_absent_class_stands_still_and_counts_its_own_appearances() -> None:
    config = with_classes(6, batch_size=2, images=2 * 30, gradient_clip=1e9)
    data = data_of(6)
    state, batches = start(config), ClassBatches(data.labels, 6, 2, config.seed)
    tailors = state.tailors
    alone = [torch.nn.Parameter(row.clone()) for row in tailors.weight]
    optimizers = [torch.optim.AdamW([row], betas=BETAS, weight_decay=config.weight_decay) for row in alone]
    average = tailors.weight.clone()
    seen: dict[int, Tensor] = {}
    update = tailors.update

    def spy(classes: Tensor, gradient: Tensor, *rest: Any) -> None:
        seen.update(zip(classes.tolist(), gradient.clone(), strict=True))
        update(classes, gradient, *rest)

    state.tailors = dataclasses.replace(tailors)
    object.__setattr__(state.tailors, "update", spy)
    for step in range(config.steps):
        before = tailors.weight.clone()
        seen.clear()
        train_step(config, state, data, batches)
        assert set(seen) == set(batches(step).labels.tolist())
        for c in range(6):
            assert torch.equal(tailors.weight[c], before[c]) == (c not in seen)
        for c, gradient in seen.items():
            alone[c].grad = gradient
            optimizers[c].param_groups[0]["lr"] = learning_rate(config, step)
            optimizers[c].step()
        average.lerp_(tailors.weight, 1 - decay_at(config.ema_decay, step))  # of every class, in every step
        torch.testing.assert_close(tailors.current_average(step + 1, config.ema_decay), average)
    assert tailors.appearances.sum() < 2 * config.steps
    torch.testing.assert_close(tailors.weight, torch.stack([row.detach() for row in alone]))


@given(st.floats(0, 0.9999), st.integers(0, 60), st.integers(0, 60))
def test_what_is_left_of_an_average_is_the_product_of_its_decays(decay: float, since: int, more: int) -> None:
    wanted = math.prod(decay_at(decay, step) for step in range(since, since + more))
    assert average_kept(decay, since, since + more) == pytest.approx(wanted, rel=1e-9, abs=1e-300)


class Counting(TorchDispatchMode):
    """How many values all operators return."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.values += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def test_the_work_of_a_step_does_not_grow_with_the_classes() -> None:
    work = []
    for classes in (30, 1000):
        config, data = with_classes(classes, batch_size=10, images=50), data_of(classes, 1)
        state, batches = start(config), ClassBatches(data.labels, classes, 10, 0)
        train_step(config, state, data, batches)  # the first step shuffles the images
        with Counting() as counting:
            train_step(config, state, data, batches)
        work.append(counting.values)
    assert state.tailors.weight.numel() > work[1], "so that a pass over all tailors would be seen"
    assert work[1] == pytest.approx(work[0], rel=0.02)  # some count per class, as bookkeeping does


def test_clipping_sees_the_tailors() -> None:
    lengths = []
    for clip in (1e9, 1e-3):
        config, data = with_classes(20, batch_size=4, images=40, gradient_clip=clip), data_of(20)
        state, batches = start(config), ClassBatches(data.labels, 20, 4, 0)
        noise = torch.Generator().manual_seed(0)
        for parameter in state.parameters().values():  # a fresh model's blocks are closed: nothing reaches its tailors
            torch.nn.init.normal_(parameter, std=0.2, generator=noise)
        seen: list[Tensor] = []
        object.__setattr__(state.tailors, "update", lambda classes, gradient, *_, seen=seen: seen.append(gradient))
        train_step(config, state, data, batches)
        own = torch.stack([p.grad.norm() for p in state.parameters().values()]).norm()
        lengths.append((float(own), float(seen[0].norm())))
    whole = math.hypot(*lengths[0])
    assert lengths[1] == pytest.approx([1e-3 * length / whole for length in lengths[0]], rel=1e-3)
    assert lengths[0][1] > 0.01 * whole


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile, of its own tensors
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # and what it does itself
def test_a_compiled_block_is_one_graph_whatever_the_step() -> None:
    graphs = CompileCounter()
    config, data = with_classes(40, batch_size=12, images=72), data_of(40)
    losses = []
    for compiled in (False, True):
        state, batches = start(config), ClassBatches(data.labels, 40, 12, 0)
        for block in state.model.blocks if compiled else ():
            block.compile(backend=graphs, fullgraph=True)
        losses.append([train_step(config, state, data, batches, NestedLoss("flow", 0)) for _ in range(6)])
    assert graphs.frame_count == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bf16_is_close_and_its_weights_stay_fp32() -> None:
    data, losses = data_of(3), []
    for precision in ("fp32", "bf16"):
        config = dataclasses.replace(CONFIG, precision=precision)
        state, batches = start(config), ClassBatches(data.labels, 3, 12, 0)
        losses.append([train_step(config, state, data, batches) for _ in range(6)])
        assert {tensor.dtype for tensor in weights(state).values()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)

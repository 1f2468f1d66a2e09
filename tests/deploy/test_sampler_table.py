"""The sampler as numbers: the recurrence in NumPy takes the very steps that the scheduler takes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kind_edge.deploy.sampler_table import SamplerTable, sampler_table
from kind_edge.errors import UsageError
from kind_edge.model.sampling import make_scheduler, sample

Array = NDArray[np.float64]
SAMPLERS = [("euler", "flow"), ("heun", "flow"), ("ddim", "epsilon"), ("dpmsolver++", "epsilon")]
STEPS = [1, 2, 4, 10, 14, 15, 20]  # DPM-Solver++ takes its last step otherwise below 15; 14 does not divide 1000
NOISE = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(x: torch.Tensor, timestep: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Smooth, and different at every timestep and pixel."""
    t = timestep.double().view(-1, 1, 1, 1) / 1000
    return 0.9 * x + 0.3 * torch.sin(x + 5 * t) * (1.2 - t)


def recurrence(table: SamplerTable, noise: Array) -> Array:
    x, before = noise, np.zeros_like(noise)
    for row, timestep in enumerate(table.timestep):
        prediction = network(torch.from_numpy(x), torch.full((len(x),), timestep), torch.zeros(0)).numpy()
        d = table.p[row] * x + table.q[row] * prediction
        x, before = table.a[row] * x + table.b[row] * d + table.c[row] * before, d
    return x


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("kind", "objective"), SAMPLERS)
def test_the_recurrence_is_the_scheduler(kind: str, objective: str, steps: int) -> None:
    table = sampler_table(kind, objective, steps)
    wanted = sample(network, NOISE, torch.zeros(2).long(), objective, steps, kind).numpy()
    got = recurrence(table, NOISE.numpy())
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("kind", "objective"), SAMPLERS)
def test_rows_are_finite_evaluations_at_falling_timesteps(kind: str, objective: str, steps: int) -> None:
    table = sampler_table(kind, objective, steps)
    values = table.to_dict()
    assert list(values) == ["timestep", "p", "q", "a", "b", "c"]
    assert {len(column) for column in values.values()} == {2 * steps - 1 if kind == "heun" else steps}
    assert all(np.isfinite(column).all() for column in values.values())
    assert json.loads(json.dumps(values)) == values
    timestep = table.timestep[::2] if kind == "heun" else table.timestep  # a corrector runs where its step ends
    assert (np.diff(timestep) < 0).all()
    assert np.array_equal(table.timestep, make_scheduler(kind, objective, steps).timesteps.double().numpy())
    assert table.c[0] == 0
    assert 0 <= timestep[-1] <= timestep[0] <= 1000


def test_euler_is_evenly_spaced_down_to_the_image() -> None:
    table = sampler_table("euler", "flow", 4)
    np.testing.assert_allclose(table.timestep, [1000, 750, 500, 250])
    np.testing.assert_allclose(table.b, [-0.25] * 4)


def test_unknown_samplers_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown sampler for the flow objective 'ddim'"):
        sampler_table("ddim", "flow", 4)

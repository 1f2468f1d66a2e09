"""Profiles: every packaged one is complete and plausible, a wrong file is refused with the reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kind_edge.budget import host
from kind_edge.budget.profile import HOST, MARKS, DeviceProfile, load_profile, profile_names
from kind_edge.budget.profile_file import parse_profile
from kind_edge.errors import InputError, UsageError

DEVICES = [name for name in profile_names() if name != HOST]

MINIMAL = """
title = "Test"
os = "none"
execution_providers = []
[memory]
kind = "LPDDR5"
ram_gib = { value = 4, mark = "G", source = "test" }
[cpu.cores]
mark = "G"
source = "test"
clusters = [{ count = 2, name = "big", ghz = 2.0, fp32_lanes = 8 }, { count = 4, name = "little", ghz = 1.0, fp32_lanes = 4, little = true }]
"""  # noqa: E501


def test_the_devices() -> None:
    assert len(DEVICES) == 14
    assert {"snapdragon8g3", "apple-a18", "kirin-9020", "raspberry-pi-5", "jetson-orin-nano"} < set(DEVICES)


@pytest.mark.parametrize("name", DEVICES)
def test_every_figure_has_a_mark_and_a_source(name: str) -> None:
    profile = load_profile(name)
    figures = dict(profile.figures())
    assert all(figure.mark in MARKS and figure.source for figure in figures.values())
    assert all(figure.mark == "E" for figure in figures.values() if figure.source.startswith("derived"))
    assert profile.app_memory_limit_bytes.value < profile.ram_bytes.value
    for unit in profile.units.values():
        for precision in unit.peak_flops_per_s:
            assert 1e9 < profile.throughput(unit.name, precision) <= unit.peak(precision).value < 1e14
    assert profile.units_for("int8") == ("cpu",)


def test_gpu_peaks_of_the_authors() -> None:
    peaks = {"apple-a18": 1907e9, "kirin-9020": 1720e9, "snapdragon8g3": 2774e9}
    assert {name: load_profile(name).unit("gpu").peak("fp32").value for name in peaks} == peaks


def test_units_by_format() -> None:
    phone = load_profile("snapdragon8g3")
    assert phone.units_for("fp32") == phone.units_for("fp16") == ("cpu", "gpu")
    assert phone.units_for("int8-qdq") == ("npu", "cpu")
    assert load_profile("dimensity-9300").units_for("int8-qdq") == ("cpu",)  # no provider reaches its NPU
    assert load_profile("raspberry-pi-5").units_for("fp32") == ("cpu",)
    with pytest.raises(UsageError, match="not a precision of coreml"):
        phone.units_for("int8-qdq", "coreml")


def test_a_missing_unit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--unit npu: profile 'tensor-g4' has no figure .*cpu, gpu"):
        load_profile("tensor-g4").throughput("npu", "int8")
    with pytest.raises(UsageError, match="no fp32 figure"):
        load_profile("apple-a18").throughput("npu", "fp32")


def test_what_is_left_out_is_derived() -> None:
    profile = parse_profile(MINIMAL, "mine", "mine.toml")
    cpu = profile.unit("cpu")
    assert cpu.peak("fp32").value == 2 * 2 * 8 * 2.0e9  # the little cores do not count
    assert (cpu.peak("fp16").value, cpu.peak("int8").value) == (128e9, 256e9)
    assert profile.memory_bytes_per_s.value == 51.2e9
    assert {figure.mark for name, figure in profile.figures() if name != "ram_bytes"} == {"E"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ram_gib", "ram_gb", r"mine.toml: memory: unknown key 'ram_gb'; nearest known: .*ram_gib"),
        ('"LPDDR5"', '"SRAM"', "missing bandwidth_gb_per_s, or a kind"),
        ("value = 4", "value = -4", "memory.ram_gib.value: got -4, want a number above zero"),
        ('mark = "G", source', 'mark = "X", source', "memory.ram_gib.mark: got 'X', want one of P, 3P"),
        ("count = 2", "counts = 2", r"clusters\[0\]: unknown key 'counts'; nearest known: count"),
        ("[cpu.cores]", "[gpu.cores]", "gpu: unknown key 'cores'"),
        ('title = "Test"', "title = 7", "title: got 7, want some text"),
        ("[memory]", "[memory", "not TOML"),
        ("[cpu.cores]", "[npu]\n[cpu.cores]", "npu: no peak_gflops"),
    ],
)
def test_a_wrong_file_is_refused(old: str, new: str, message: str) -> None:
    assert old in MINIMAL
    with pytest.raises(InputError, match=message):
        parse_profile(MINIMAL.replace(old, new), "mine", "mine.toml")


def test_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    assert load_profile(path).name == "mine"
    with pytest.raises(InputError, match="cannot read"):
        load_profile(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="did you mean: snapdragon8g3"):
        load_profile("snapdragon-8g3")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[DeviceProfile, Path]:
    """The host profile, measured into an empty cache, and the cache's folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        return load_profile(HOST), folder


def test_the_host_is_measured(measured: tuple[DeviceProfile, Path]) -> None:
    profile, _ = measured
    cpu = profile.unit("cpu")
    assert {figure.mark for figure in cpu.peak_flops_per_s.values()} == {"M"}
    assert all(
        "threads: " in figure.source and "onnxruntime" in figure.source for figure in cpu.peak_flops_per_s.values()
    )
    assert 1e9 < profile.throughput("cpu", "fp32") < 1e14
    assert 1e8 < profile.memory_bytes_per_s.value < 1e13
    assert 0.01 < cpu.overhead_us.value < 100


def test_the_host_is_remembered(measured: tuple[DeviceProfile, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    profile, folder = measured
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    (path,) = (folder / "kind-edge").iterdir()
    assert load_profile(HOST) == profile
    other = dataclasses.replace(host.host_key(), threads=host.available_threads() + 1)
    assert host.cache_path(other) != path == host.cache_path(host.host_key())


@pytest.mark.parametrize("damage", ["", "{}", "[cpu]\noverhead_us = 1", None])
def test_a_damaged_cache_counts_as_none(
    damage: str | None, measured: tuple[DeviceProfile, Path], tmp_path: Path
) -> None:
    _, folder = measured
    (path,) = (folder / "kind-edge").iterdir()
    assert host.cached_profile(path) is not None
    damaged = tmp_path / "host.toml"
    damaged.write_text(path.read_text("utf-8")[:-30] if damage is None else damage, encoding="utf-8")
    assert host.cached_profile(damaged) is None

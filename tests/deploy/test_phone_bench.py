"""`bench --runner "adb shell"`: the commands, and the whole way through an adb that is this machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from kind_edge.deploy.phone_bench import bench_on_phone, steps
from kind_edge.errors import GateError, InputError, UsageError

PRINTED = """Session creation time cost: 0.0312 s
First inference time cost: 3 ms
Total inference time cost: 0.123 s
Total inference requests: 20
Average inference time cost total: 2.46 ms
Avg CPU usage: 50 %
Peak working set size: 25165824 bytes
Runs:20
Min Latency: 0.00231 s
P50 Latency: 0.00244 s
P90 Latency: 0.0026 s
P95 Latency: 0.0027 s
P99 Latency: 0.0031 s
P999 Latency: 0.0031 s
"""
ADB = """#!/bin/sh
# An adb whose device is the folder DEVICE of this machine.
[ "$1" = -s ] && shift 2
case "$1" in
push) cp -r "$2" "$DEVICE$3" ;;
shell) shift; sh -c "$(printf %s "$*" | sed "s|/data/local/tmp|$DEVICE/data/local/tmp|g")" ;;
esac
"""
PERF_TEST = f"""#!/bin/sh
echo "$@" > "$DEVICE/asked"
for model; do :; done
cp -r "$(dirname "$model")" "$DEVICE/seen"
cat <<'END'
{PRINTED}END
"""


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A phone with the perf test in its place."""
    place = tmp_path / "device" / "data" / "local" / "tmp"
    place.mkdir(parents=True)
    tools = {tmp_path / "bin" / "adb": ADB, place / "onnxruntime_perf_test": PERF_TEST}
    tools[tmp_path / "bin" / "getprop"] = '#!/bin/sh\ncase "$1" in ro.product.model) echo Pixel;; *) echo;; esac\n'
    for path, text in tools.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("DEVICE", str(tmp_path / "device"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "device"


def test_commands() -> None:
    todo = steps("adb -s X1 shell", Path("/tmp/m"), "a b.onnx", 50, 4, "xnnpack")
    assert todo.push == ("adb", "-s", "X1", "push", "/tmp/m/.", "/data/local/tmp/kind-edge")
    assert todo.measure == (
        "adb", "-s", "X1", "shell",
        "cd /data/local/tmp && LD_LIBRARY_PATH=. ./onnxruntime_perf_test -m times -r 50 -e xnnpack -D -s -x 4 "
        "/data/local/tmp/kind-edge/'a b.onnx'",
    )  # fmt: skip
    assert todo.clear[-1] == "rm -rf /data/local/tmp/kind-edge"
    for runner in ("ssh board", "adb", "adb push", "adb 'shell"):
        with pytest.raises(UsageError, match="--runner"):
            steps(runner, Path(), "m", 1, None, "cpu")


def test_a_model_is_measured_and_cleared_away(device: Path, make_bundle: Callable[..., Path]) -> None:
    model = make_bundle() / "onnx" / "denoiser.onnx"
    found = bench_on_phone(model, "adb -s X1 shell", threads=2, runs=20)
    assert (found.cold_load_ms, found.mean_ms) == (31.2, 2.46)
    assert (round(found.p50_ms, 6), round(found.p90_ms, 6), round(found.p99_ms, 6)) == (2.44, 2.6, 3.1)
    assert found.peak_memory_bytes == 24 * 2**20
    assert (found.conditions.cpu, found.conditions.threads) == ("Pixel", 2)
    assert (device / "asked").read_text().startswith("-m times -r 20 -e cpu -D -s -x 2 ")
    assert (device / "seen" / "denoiser.onnx").read_bytes() == model.read_bytes()
    inputs = [onnx.load_tensor(path) for path in sorted((device / "seen" / "test_data_set_0").iterdir())]
    assert [(each.name, list(each.dims)) for each in inputs] == [
        ("sample", [1, 1, 6, 5]), ("step_index", [1]), ("class_index", [1]),
    ]  # fmt: skip
    assert not (device / "data" / "local" / "tmp" / "kind-edge").exists()


def test_what_goes_wrong_is_said(device: Path, make_bundle: Callable[..., Path]) -> None:
    model = make_bundle() / "onnx" / "denoiser.onnx"
    program = device / "data" / "local" / "tmp" / "onnxruntime_perf_test"
    program.write_text("#!/bin/sh\necho nothing\n")
    with pytest.raises(InputError, match="lacks cold_load_ms"):
        bench_on_phone(model, "adb shell", None, 1)
    program.unlink()
    with pytest.raises(GateError, match=r"exit code 127: .* must lie in /data/local/tmp"):
        bench_on_phone(model, "adb shell", None, 1)
    assert not (program.parent / "kind-edge").exists()
    with pytest.raises(UsageError, match="cannot be started"):
        bench_on_phone(model, "no-such-adb shell", None, 1)

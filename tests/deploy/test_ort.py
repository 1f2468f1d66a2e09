"""Which ONNX Runtime is there: one, none, both, or a broken one."""

import sys
from pathlib import Path

import pytest

from kind_edge.deploy.ort import DISTRIBUTIONS, require_onnxruntime
from kind_edge.errors import UsageError


def _pretend_installed(folder: Path, distribution: str) -> None:
    """Write the metadata that pip writes, so that importlib.metadata finds the distribution in `folder`."""
    info = folder / f"{distribution.replace('-', '_')}-1.31.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.31.1\n")


def test_the_installed_runtime_is_returned() -> None:
    assert require_onnxruntime().InferenceSession


def test_two_distributions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for distribution in DISTRIBUTIONS[:2]:
        _pretend_installed(tmp_path, distribution)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="-m pip uninstall -y onnxruntime onnxruntime-gpu && "):
        require_onnxruntime()


@pytest.mark.parametrize(
    ("on_path", "command"),
    [([], "-m pip install onnxruntime "), (["onnxruntime"], "install --force-reinstall --no-deps onnxruntime$")],
    ids=["missing", "broken"],
)
def test_a_runtime_that_does_not_import_names_the_command(
    on_path: list[str], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for distribution in on_path:
        _pretend_installed(tmp_path, distribution)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=command):
        require_onnxruntime()

"""The page in a real browser: headless Chromium loads it, draws, goes offline, and meets a damaged model."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kind_edge.deploy.packs_bundle import change_bundle
from kind_edge.deploy.pipeline import export
from kind_edge.deploy.runtime import LoadedBundle, load_bundle
from kind_edge.deploy.serve import make_server, page_folder
from kind_edge.deploy.web import PACKAGER

pytestmark = pytest.mark.slow
Contents = Callable[[Path], dict[str, bytes]]
CLASSES = ["sneaker", "bag"]
DRAWN = "!document.querySelector('#draw').disabled && document.querySelectorAll('#gallery a').length == %d"
FAILED = "document.querySelector('#status.failed')"


@pytest.fixture(scope="session")
def bundle(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The shipped model for two classes, with its page. Only to be read."""

    def make(folder: Path) -> None:
        export(
            "fashion-mnist", profile="snapdragon8g3", classes=CLASSES, formats=["web", "packs"], output=folder / "out"
        )

    return made_once("web", make) / "out"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        yield running


@contextmanager
def chromium(driver: Any, *flags: str) -> Iterator[Any]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None and "CI" not in os.environ:
        pytest.skip("no Chromium on this machine: scripts/fetch-chromium brings it")
    running = driver.chromium.launch(executable_path=found, args=["--no-sandbox", *flags])
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser(driver: Any) -> Iterator[Any]:
    with chromium(driver) as running:
        yield running


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with make_server(page_folder(folder), 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


@contextmanager
def fresh_page(browser: Any) -> Iterator[Any]:
    """A browser without any past, on a phone's screen; an uncaught error of the page fails the test."""
    errors: list[str] = []
    with browser.new_context(viewport={"width": 390, "height": 844}) as context:
        opened = context.new_page()
        opened.set_default_timeout(60_000)
        opened.on("pageerror", lambda error: errors.append(str(error)))
        yield opened
    assert not errors


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    with fresh_page(browser) as opened:
        yield opened


def psnr_db(reference: np.ndarray, found: np.ndarray) -> float:
    """Of images in [-1, 1]."""
    return float(10 * np.log10(4 / np.mean((reference.astype(np.float64) - found) ** 2)))


def expected(loaded: LoadedBundle, name: str, seed: int, n: int) -> np.ndarray:
    """What the Python runtime draws, before it is rounded to pixels: [n, 28, 28]."""
    from kind_edge.deploy.noise import gaussian_noise

    noise = gaussian_noise(seed, 0, n, loaded.noise_shape)
    return loaded.sample_float(noise, np.full(n, loaded.classes.index(name)))[:, 0]


def test_pictures_are_those_of_python(bundle: Path, page: Any) -> None:
    draw = """async ([model, name, seed]) => {
        const { load } = await import("/kind-edge.js");
        const opened = await load(".", { model });
        const pictures = await opened.generate(name, { n: 2, seed });
        return pictures.map((picture) => Array.from(picture.values));
    }"""
    with served(bundle) as url:
        page.goto(url)
        assert page.evaluate("crossOriginIsolated"), "the server's headers give the page threads"
        for precision, seed in (("fp32", "0"), ("int8", "81985529216486895")):
            found = np.array(page.evaluate(draw, [precision, "bag", seed])).reshape(2, 28, 28)
            reference = expected(load_bundle(bundle, precision), "bag", int(seed), 2)
            assert psnr_db(reference, found) >= 25
            if precision == "fp32":
                assert np.abs(reference - found).max() / 2 < 1e-3


def test_draws_on_webgpu_what_python_draws(tiny_folder: Path, tmp_path: Path, driver: Any) -> None:
    """On Chromium's own GPU in software; of a small model, as each of its evaluations takes long."""
    choices: dict[str, Any] = {"classes": ["shirt", "bag"], "formats": ["web"], "steps": 2}
    export(tiny_folder, profile="snapdragon8g3", output=tmp_path / "b", **choices)
    draw = """async ([model, seed]) => {
        const { load } = await import("/kind-edge.js");
        const opened = await load(".", { model, backend: "gpu" });
        const pictures = await opened.generate("bag", { n: 1, seed });
        return pictures.map((picture) => Array.from(picture.values));
    }"""
    lose = """async () => {
        const ort = await import("/runtime/ort.webgpu.min.mjs");
        (await ort.env.webgpu.device).destroy();
    }"""
    with served(tmp_path / "b") as url, chromium(driver, "--enable-unsafe-webgpu") as gpu, fresh_page(gpu) as page:
        page.goto(url)
        page.wait_for_selector("#draw:not([disabled])")
        if not page.evaluate("async () => Boolean(await navigator.gpu?.requestAdapter())"):
            pytest.skip("this Chromium has no WebGPU: no GPU, no Vulkan driver, and not Debian's SwiftShader")
        offered = page.get_by_label("Runs on").locator("option").all_inner_texts()
        assert offered == ["CPU, fp32", "GPU in software, fp32", "CPU, int8"], "integers stay on the CPU"
        page.get_by_label("Runs on").select_option("GPU in software, fp32")
        page.get_by_role("spinbutton", name="Pictures").fill("1")
        page.click("#draw")
        page.wait_for_function(DRAWN % 1)
        assert page.get_by_role("status").inner_text().endswith("on the GPU in software, fp32.")
        found = np.array(page.evaluate(draw, ["fp32", "3"])).reshape(1, 8, 8)
        assert np.abs(expected(load_bundle(tmp_path / "b", "fp32"), "bag", 3, 1) - found).max() / 2 < 1e-3
        with pytest.raises(Exception, match="WebGPU has no kernels for int8; run it on the CPU"):
            page.evaluate(draw, ["int8", "3"])
        page.evaluate(lose)
        page.click("#draw")
        page.wait_for_function(FAILED)
        assert page.get_by_role("status").inner_text().startswith("The GPU is gone (")


def test_draws_by_keyboard_and_again_without_a_network(bundle: Path, page: Any) -> None:
    with served(bundle) as url:
        page.goto(url)
        page.get_by_role("combobox", name="Class").select_option("bag")
        page.get_by_role("spinbutton", name="Pictures").fill("3")
        page.get_by_label("Seed").fill("5")
        page.keyboard.press("Enter")
        page.wait_for_function(DRAWN % 3)
        assert "3 pictures" in page.get_by_role("status").inner_text()
        assert page.get_by_role("link", name="bag, seed 5, number 2; save").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "fits a phone's screen"
        page.wait_for_selector("body[data-offline=ready]")
    page.context.set_offline(True)  # and the server has gone, too
    page.reload()
    page.wait_for_selector("#draw:not([disabled])")
    page.click("#draw")
    page.wait_for_function(DRAWN % 8)


def test_can_be_stopped(bundle: Path, page: Any) -> None:
    with served(bundle) as url:
        page.goto(url)
        page.wait_for_selector("#draw:not([disabled])")
        page.get_by_role("spinbutton", name="Pictures").fill("64")
        page.focus("#draw")
        page.keyboard.press("Enter")
        page.wait_for_selector("#gallery a")
        page.keyboard.press("Enter")  # on the other button now, as the first is disabled
        page.wait_for_selector("#draw:not([disabled]):focus")
        assert page.get_by_role("status").inner_text() == "Stopped."
        assert page.locator("#gallery a").count() < 64


def test_a_damaged_model_is_refused_in_words_and_mended_by_a_whole_one(bundle: Path, page: Any, tmp_path: Path) -> None:
    copy = tmp_path / "web"
    shutil.copytree(bundle / "web", copy)
    model = copy / "models" / "denoiser.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1000] + bytes(1000))
    with served(copy) as url:
        page.goto(url)
        page.wait_for_selector("#draw:not([disabled])")
        page.click("#draw")
        page.wait_for_function(FAILED)
        assert "models/denoiser.onnx is damaged" in page.get_by_role("status").inner_text()
        page.wait_for_selector("body[data-offline=ready]")  # the damaged copy lies in the offline cache now
        model.write_bytes(whole)
        page.reload()
        page.wait_for_selector("#draw:not([disabled])")
        page.click("#draw")
        page.wait_for_function(DRAWN % 8)


def test_takes_a_class_that_was_left_out(bundle: Path, page: Any, tmp_path: Path) -> None:
    small = shutil.copytree(bundle, tmp_path / "small", ignore=shutil.ignore_patterns("web"))
    values = json.loads((small / "manifest.json").read_text())
    values["files"] = {name: each for name, each in values["files"].items() if not name.startswith("web/")}
    (small / "manifest.json").write_text(json.dumps(values))
    change_bundle(small, remove=["bag"])
    PACKAGER.write(small, json.loads((small / "manifest.json").read_text()))
    pack = bundle / "packs" / "bag.safetensors"
    draw = """async (bytes) => {
        const { load } = await import("/kind-edge.js");
        const model = await load(".", { packs: [Uint8Array.from(bytes)] });
        const [picture] = await model.generate("bag", { seed: 3 });
        return Array.from(picture.values);
    }"""
    with served(small) as url:
        page.goto(url)
        page.wait_for_selector("#draw:not([disabled])")
        page.get_by_label("Add classes").set_input_files(pack)
        page.wait_for_function("document.querySelector('#status').textContent == 'Added: bag.'")
        page.click("#draw")
        page.wait_for_function(DRAWN % 8)
        assert page.get_by_role("link", name="bag, seed 0, number 7; save").count() == 1
        found = np.array(page.evaluate(draw, list(pack.read_bytes()))).reshape(28, 28)
        reference = expected(load_bundle(bundle), "bag", 3, 1)[0]
        assert np.abs(reference - found).max() / 2 < 1e-3
        page.get_by_label("Add classes").set_input_files(pack)
        page.wait_for_function(FAILED)
        assert "bag is there already" in page.get_by_role("status").inner_text()


def test_the_page_is_the_same_when_it_is_written_again(bundle: Path, tmp_path: Path, contents: Contents) -> None:
    again = shutil.copytree(bundle, tmp_path / "again", ignore=shutil.ignore_patterns("web"))
    PACKAGER.write(again, json.loads((bundle / "manifest.json").read_text()))
    assert contents(bundle / "web") == contents(again / "web")

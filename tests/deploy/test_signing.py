"""A signed bundle is what its owner signed, to the last byte; keys and signatures are openssl's own."""

from __future__ import annotations

import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kind_edge.deploy.bundle import open_bundle, verified_manifest, write_manifest, writing_bundle, zip_bundle
from kind_edge.deploy.packs_bundle import change_bundle
from kind_edge.deploy.runtime import load_bundle
from kind_edge.deploy.signing import SIGNATURE_NAME, SigningKey, check_signature, read_signing_key
from kind_edge.errors import InputError, UsageError

PRIVATE, PUBLIC = "key.pem", "public.pem"


def openssl(*arguments: object) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine: keys are made with it")
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """key.pem with public.pem, other.pem with other-public.pem, locked.pem, and an RSA pair."""
    folder = tmp_path_factory.mktemp("keys")
    for private, public in ((PRIVATE, PUBLIC), ("other.pem", "other-public.pem")):
        openssl("genpkey", "-algorithm", "ed25519", "-out", folder / private)
        openssl("pkey", "-in", folder / private, "-pubout", "-out", folder / public)
    openssl("pkey", "-in", folder / PRIVATE, "-aes256", "-passout", "pass:open", "-out", folder / "locked.pem")
    openssl("genpkey", "-algorithm", "rsa", "-pkeyopt", "rsa_keygen_bits:1024", "-out", folder / "rsa.pem")
    openssl("pkey", "-in", folder / "rsa.pem", "-pubout", "-out", folder / "rsa-public.pem")
    (folder / "text.pem").write_text("no key")
    (folder / "damaged.pem").write_bytes((folder / PRIVATE).read_bytes().replace(b"M", b"N"))
    return folder


@pytest.fixture
def write(tmp_path: Path, bundle_values: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """A bundle whose files are text, signed with a key, or not."""

    def bundle(key: SigningKey | None) -> Path:
        with writing_bundle(tmp_path / "out", key=key) as folder:
            values = bundle_values()
            for name in values["models"]:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(name)
            write_manifest(folder, values)
        return tmp_path / "out"

    return bundle


def check(path: Path, key: Path) -> None:
    with open_bundle(path) as folder:
        verified_manifest(folder, str(path), key)


def test_what_is_signed_here_openssl_verifies_and_the_other_way_round(
    keys: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    key = read_signing_key(keys / PRIVATE)
    folder = write(key)
    check(folder, keys / PUBLIC)
    check(zip_bundle(folder), keys / PUBLIC)
    with_openssl = ("-rawin", "-in", folder / "manifest.json")
    openssl("pkeyutl", "-verify", "-pubin", "-inkey", keys / PUBLIC, *with_openssl, "-sigfile", folder / SIGNATURE_NAME)
    before = (folder / SIGNATURE_NAME).read_bytes()
    openssl("pkeyutl", "-sign", "-inkey", keys / PRIVATE, *with_openssl, "-out", folder / SIGNATURE_NAME)
    assert (folder / SIGNATURE_NAME).read_bytes() == before
    assert read_signing_key(keys / "locked.pem", lambda: "open") == key == pickle.loads(pickle.dumps(key))
    assert str(key.secret) not in repr(key)


def test_nothing_that_was_not_signed_for_is_accepted(keys: Path, write: Callable[..., Path]) -> None:
    key = read_signing_key(keys / PRIVATE)

    def refused(message: str, change: Callable[[Path], object]) -> None:
        folder = write(key)
        change(folder)
        with pytest.raises(InputError, match=message):
            check(folder, keys / PUBLIC)
        shutil.rmtree(folder)

    model = "onnx/denoiser.onnx"
    refused("does not hold for .*public.pem", lambda f: f.joinpath("manifest.json").write_text(
        f.joinpath("manifest.json").read_text().replace('"name": "test"', '"name": "tess"')))  # fmt: skip
    refused("not signed: it has no manifest.sig", lambda f: f.joinpath(SIGNATURE_NAME).unlink())
    refused("want 64 bytes", lambda f: f.joinpath(SIGNATURE_NAME).write_bytes(bytes(65)))
    refused("does not hold", lambda f: f.joinpath(SIGNATURE_NAME).write_bytes(bytes(64)))
    refused(f"{model}: sha256 is", lambda f: f.joinpath(model).write_text("onnx/denoiser.onny"))
    refused(f"{model}: missing", lambda f: f.joinpath(model).unlink())
    refused("extra.txt: not in the manifest", lambda f: f.joinpath("extra.txt").touch())
    refused(r"\.DS_Store: not in the manifest", lambda f: f.joinpath(".DS_Store").touch())
    refused("onnx/manifest.sig: not in the manifest", lambda f: f.joinpath("onnx", SIGNATURE_NAME).touch())
    with pytest.raises(InputError, match=r"does not hold for .*other-public\.pem"):
        check(write(key), keys / "other-public.pem")


def test_a_bundle_that_is_written_anew_keeps_no_old_signature(keys: Path, write: Callable[..., Path]) -> None:
    assert (write(read_signing_key(keys / PRIVATE)) / SIGNATURE_NAME).exists()
    assert not (write(None) / SIGNATURE_NAME).exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rsa.pem", r"of another kind \(RSA\); want Ed25519: openssl genpkey"),
        (PUBLIC, "holds 'PUBLIC KEY'; want a private Ed25519 key"),
        ("text.pem", r"no key in PEM form"),
        ("damaged.pem", "want a private Ed25519 key"),
        ("none.pem", "cannot read a private key: No such file"),
        ("locked.pem", "a wrong passphrase"),
    ],
)
def test_a_key_that_cannot_sign_is_refused(keys: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_signing_key(keys / name, lambda: "shut")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rsa-public.pem", r"of another kind \(RSA\)"),
        (PRIVATE, "holds 'PRIVATE KEY'; want the public half .* -pubout"),
        ("text.pem", "no key in PEM form"),
    ],
)
def test_a_key_that_cannot_check_is_refused(keys: Path, write: Callable[..., Path], name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(write(None), keys / name)


@settings(max_examples=25)
@given(st.binary(max_size=80))
def test_no_other_bytes_are_a_signature(keys: Path, signature: bytes) -> None:
    key = read_signing_key(keys / PRIVATE)
    (keys / "folder").mkdir(exist_ok=True)
    (keys / "folder" / SIGNATURE_NAME).write_bytes(signature)
    with pytest.raises(InputError):
        check_signature(keys / "folder", b"{}", keys / PUBLIC, "here")
    (keys / "folder" / SIGNATURE_NAME).write_bytes(key.sign(signature))
    check_signature(keys / "folder", signature, keys / PUBLIC, "here")


def test_packs_take_the_signature_away_or_make_it_anew(keys: Path, packed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "b")
    key = read_signing_key(keys / PRIVATE)
    assert not change_bundle(folder, remove=["bag"], sign=key).unsigned
    check(folder, keys / PUBLIC)
    assert load_bundle(folder, key=keys / PUBLIC).classes == ("sneaker", "coat", "shirt")
    assert change_bundle(folder, remove=["coat"]).unsigned
    with pytest.raises(InputError, match="not signed"):
        load_bundle(folder, key=keys / PUBLIC)
    with pytest.raises(UsageError, match="leave verify on"):
        load_bundle(folder, key=keys / PUBLIC, verify=False)

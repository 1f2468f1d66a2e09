"""Signed bundles: `manifest.sig`, a detached Ed25519 signature (RFC 8032) of the very bytes of `manifest.json`.

The manifest has the hash of every other file, so one signature speaks for the whole bundle. Keys are PEM files as
`openssl genpkey -algorithm ed25519` writes them; `cryptography` is loaded when a key is, never before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kind_edge.errors import InputError, UsageError

if TYPE_CHECKING:
    from types import ModuleType

SIGNATURE_NAME, SIGNATURE_BYTES = "manifest.sig", 64

_MAX_PEM_BYTES = 16 * 1024
"""An Ed25519 key takes about 120 bytes, one with a passphrase 300."""
_MAKE = "openssl genpkey -algorithm ed25519 -out KEY.pem"
_PUBLISH = "openssl pkey -in KEY.pem -pubout -out PUBLIC.pem"

Ask = Callable[[], str]
"""Called for the passphrase of a key that has one."""


@dataclass(frozen=True)
class SigningKey:
    """A private Ed25519 key; plain bytes, so that it can go along to other processes of ours."""

    secret: bytes = field(repr=False)

    def sign(self, content: bytes) -> bytes:
        """64 bytes; the same content gives the same signature."""
        return bytes(_library().ed25519.Ed25519PrivateKey.from_private_bytes(self.secret).sign(content))


def read_signing_key(path: Path | str, ask: Ask | None = None) -> SigningKey:
    """The private key in a PEM file; `ask` is called for its passphrase, where it has one.

    Raises `InputError` for any other kind of file or key, and for a wrong passphrase, `UsageError` where a passphrase
    is needed and there is nobody to ask.
    """
    content, library = _pem(path, "a private key"), _library()
    if b"ENCRYPTED" in content:
        if ask is None:
            raise UsageError(f"{path}: the key has a passphrase, and nobody can be asked for it here")
        passphrase: bytes | None = ask().encode()
    else:
        passphrase = None
    try:
        key = library.serialization.load_pem_private_key(content, passphrase)
    except (ValueError, TypeError, library.unsupported) as error:
        if passphrase is not None:
            raise InputError(f"{path}: cannot be opened: a wrong passphrase, or a damaged file") from error
        raise _no_key(path, content, f"a private Ed25519 key ({_MAKE})") from error
    if not isinstance(key, library.ed25519.Ed25519PrivateKey):
        raise InputError(f"{path}: a private key of another kind ({_kind(key)}); want Ed25519: {_MAKE}")
    return SigningKey(key.private_bytes_raw())


def check_signature(folder: Path, content: bytes, key: Path | str, where: str) -> None:
    """Refuse a bundle whose `manifest.sig` is not the signature of its manifest's bytes by the owner of `key`.

    `key` is a PEM file with the public half. Raises `InputError`.
    """
    library = _library()
    pem = _pem(key, "a public key")
    try:
        public = library.serialization.load_pem_public_key(pem)
    except (ValueError, library.unsupported) as error:
        raise _no_key(key, pem, f"the public half of an Ed25519 key ({_PUBLISH})") from error
    if not isinstance(public, library.ed25519.Ed25519PublicKey):
        raise InputError(f"{key}: a public key of another kind ({_kind(public)}); want Ed25519: {_MAKE}; {_PUBLISH}")
    try:
        with open(folder / SIGNATURE_NAME, "rb") as file:
            signature = file.read(SIGNATURE_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError(f"{where}: not signed: it has no {SIGNATURE_NAME}; export or pack it with --sign") from error
    except OSError as error:
        raise InputError(f"{where}: cannot read {SIGNATURE_NAME} ({error.strerror})") from error
    if len(signature) != SIGNATURE_BYTES:
        raise InputError(f"{where}: {SIGNATURE_NAME} is no signature: want {SIGNATURE_BYTES} bytes; copy it again")
    try:
        public.verify(signature, content)
    except library.invalid as error:
        raise InputError(
            f"{where}: the signature does not hold for {key}: the manifest was changed since it was signed, "
            "or somebody else signed it; do not use the bundle"
        ) from error


@dataclass(frozen=True)
class _Library:
    """The parts of `cryptography` used here."""

    serialization: ModuleType
    ed25519: ModuleType
    invalid: type[Exception]
    unsupported: type[Exception]


def _library() -> _Library:
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UsageError("signatures need the library cryptography: pip install 'kind-edge[sign]'") from error
    return _Library(serialization, ed25519, InvalidSignature, UnsupportedAlgorithm)


def _pem(path: Path | str, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_PEM_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot read {what}: {error.strerror}") from error
    if len(content) > _MAX_PEM_BYTES or b"-----BEGIN" not in content:
        raise InputError(f"{path}: no key in PEM form (-----BEGIN ...); want {what} as openssl writes it: {_MAKE}")
    return content


def _no_key(path: Path | str, content: bytes, wanted: str) -> InputError:
    """What a PEM file is, if it is not what is wanted, in its own words."""
    begin = content.partition(b"-----BEGIN ")[2].partition(b"-----")[0]
    return InputError(f"{path}: holds {begin.decode('ascii', 'replace') or 'something else'!r}; want {wanted}")


def _kind(key: Any) -> str:
    return type(key).__name__.removeprefix("_").removesuffix("PrivateKey").removesuffix("PublicKey")

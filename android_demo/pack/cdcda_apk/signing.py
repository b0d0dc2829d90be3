"""APK signatures of scheme 2 and 3, as https://source.android.com/docs/security/features/apksigning/v2 and .../v3 define them.

Scheme 1 is not written: it is for Androids before 7, on which the app does not run.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdcda_export.errors import BuildError, ConfigError, FileError, MissingDependency
from cdcda_export.folders import make_private, writing

_MAGIC = b"APK Sig Block 42"
_V2, _V3 = 0x7109871A, 0xF05368C0
_STRIPPED = 0xBEEFF00D  # an attribute of scheme 2: there was a signature of this scheme beside it
_RSA, _EC = 0x0103, 0x0201  # with SHA-256: RSASSA-PKCS1-v1_5, ECDSA
_CURVES = ("secp256r1", "secp384r1", "secp521r1")  # P-256, P-384, P-521: what Android verifies
_CHUNK = 1 << 20
_EOCD = b"PK\x05\x06"
_V3_FROM, _ALL = 28, 0x7FFFFFFF  # Android 9 knows scheme 3
_YEARS = 30
PASSWORD = "CDCDA_KEYSTORE_PASSWORD"


@dataclass(frozen=True)
class Key:
    """Who signs.

    Attributes:
        private: the private key.
        certificate: its certificate, DER.
        public: the public key, DER.
    """

    private: Any
    certificate: bytes
    public: bytes

    @property
    def algorithm(self) -> int:
        """The number that the schemes give it."""
        from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

        return _RSA if isinstance(self.private, RSAPrivateKey) else _EC

    def sign(self, data: bytes) -> bytes:
        """Return a signature."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, padding

        if self.algorithm == _RSA:
            return bytes(self.private.sign(data, padding.PKCS1v15(), hashes.SHA256()))
        return bytes(self.private.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))


def key_of(keystore: Path, password: str | None = None) -> Key:
    """Read a PKCS #12 keystore with one key.

    Args:
        keystore: the file.
        password: of it; None for what the environment says.

    Raises:
        MissingDependency: the package cryptography is not installed.
        FileError: it cannot be read.
        ConfigError: the password is wrong, or it holds no key that Android takes.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric import ec, rsa
        from cryptography.hazmat.primitives.serialization import pkcs12
    except ImportError as error:
        raise MissingDependency("cryptography", "phone") from error
    try:
        content = keystore.read_bytes()
    except OSError as error:
        raise FileError(f"Cannot read {keystore}: {error.strerror or error}.") from error
    word = (os.environ.get(PASSWORD, "") if password is None else password).encode() or None
    try:
        private, certificate, _ = pkcs12.load_key_and_certificates(content, word)
    except ValueError as error:
        raise ConfigError(f"{keystore} is no PKCS #12 keystore, or {PASSWORD} is not its password.") from error
    if certificate is None or not isinstance(private, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{keystore} holds no RSA or elliptic-curve key with its certificate.")
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name not in _CURVES:
        raise ConfigError(f"{keystore} holds a key on the curve {private.curve.name}, and Android takes P-256, P-384 and P-521.")
    key = _key(private, certificate)
    if key.public not in key.certificate:
        raise ConfigError(f"{keystore} holds a certificate whose kind of key Android does not take, such as RSA for PSS alone.")
    return key


def own_key(path: Path) -> Key:
    """Return this machine's own key, made the first time; whoever has it can update the apps that it signed.

    Raises:
        MissingDependency: the package cryptography is not installed.
        FileError: it cannot be read or written.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric import rsa
        from cryptography.hazmat.primitives.serialization import NoEncryption, pkcs12
    except ImportError as error:
        raise MissingDependency("cryptography", "phone") from error
    with writing(path):
        if not path.exists():
            private = rsa.generate_private_key(65537, 2048)
            stored = pkcs12.serialize_key_and_certificates(b"cdcda", private, _certificate(private), None, NoEncryption())
            make_private(path.parent)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            partial.touch(mode=0o600)
            try:
                partial.write_bytes(stored)
                with suppress(FileExistsError):
                    os.link(partial, path)  # the first of two processes wins
            finally:
                partial.unlink()
    return key_of(path, "")


def _certificate(private: Any) -> Any:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cdcda")])
    today = dt.datetime.now(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(today - dt.timedelta(days=1))
    return made.not_valid_after(today + dt.timedelta(days=365 * _YEARS)).sign(private, hashes.SHA256())


def _key(private: Any, certificate: Any) -> Key:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return Key(private, certificate.public_bytes(Encoding.DER), public)


def sign(unsigned: Path, signed: Path, key: Key) -> None:
    """Write a signed copy of an APK.

    Args:
        unsigned: a zip file without a comment.
        signed: where the copy goes.
        key: who signs.

    Raises:
        BuildError: this is no such zip file.
    """
    size = unsigned.stat().st_size
    with unsigned.open("rb") as source:
        source.seek(max(0, size - 22))
        end = source.read()
        if len(end) != 22 or not end.startswith(_EOCD):
            raise BuildError(f"{unsigned} is no zip file that can be signed; pack it again.")
        directory = struct.unpack_from("<I", end, 16)[0]
        digest = _digest(unsigned, directory, end)
        block = _block(digest, key)
        with signed.open("wb") as target:
            _copy(source, target, 0, directory)
            target.write(block)
            _copy(source, target, directory, size - 22)
            target.write(end[:16] + struct.pack("<I", directory + len(block)) + end[20:])
            target.flush()
            os.fsync(target.fileno())


def _copy(source: Any, target: Any, begin: int, end: int) -> None:
    source.seek(begin)
    left = end - begin
    while left:
        chunk = source.read(min(left, _CHUNK))
        if not chunk:
            raise BuildError(f"{source.name} became shorter while it was signed; pack it again.")
        target.write(chunk)
        left -= len(chunk)


def _digest(path: Path, directory: int, end: bytes) -> bytes:
    """Return the digest of the file's three parts, in chunks of a megabyte each."""
    digests: list[bytes] = []

    def chunk(data: bytes) -> None:
        digests.append(hashlib.sha256(b"\xa5" + struct.pack("<I", len(data)) + data).digest())

    with path.open("rb") as stream:
        for begin, stop in ((0, directory), (directory, path.stat().st_size - len(end))):
            stream.seek(begin)
            for at in range(begin, stop, _CHUNK):
                chunk(stream.read(min(_CHUNK, stop - at)))
    # Its field is that of the unsigned file, where the directory stands where the block will begin.
    chunk(end)
    return hashlib.sha256(b"\x5a" + struct.pack("<I", len(digests)) + b"".join(digests)).digest()


def _sized(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def _sequence(parts: Iterable[bytes]) -> bytes:
    return _sized(b"".join(map(_sized, parts)))


def _block(digest: bytes, key: Key) -> bytes:
    """Return the block between files and directory."""
    kind = struct.pack("<I", key.algorithm)
    digests, certificates = _sequence([kind + _sized(digest)]), _sequence([key.certificate])
    versions = struct.pack("<II", _V3_FROM, _ALL)
    stripped = _sequence([struct.pack("<II", _STRIPPED, 3)])
    second = _signer(digests + certificates + stripped, b"", key, kind)
    third = _signer(digests + certificates + versions + _sequence([]), versions, key, kind)
    pairs = b"".join(_pair(number, _sequence([signer])) for number, signer in ((_V2, second), (_V3, third)))
    size = struct.pack("<Q", len(pairs) + 8 + len(_MAGIC))
    return size + pairs + size + _MAGIC


def _pair(number: int, value: bytes) -> bytes:
    return struct.pack("<QI", 4 + len(value), number) + value


def _signer(data: bytes, versions: bytes, key: Key, kind: bytes) -> bytes:
    signatures: Sequence[bytes] = [kind + _sized(key.sign(data))]
    return _sized(data) + versions + _sequence(signatures) + _sized(key.public)

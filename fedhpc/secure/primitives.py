"""The cryptography of a masked sum: key agreement, encryption of shares, and streams of random integers.

Agreement is X25519 (RFC 7748) hashed by SHA-256, encryption ChaCha20-Poly1305 (RFC 8439), a stream AES-256 in counter
mode, all of the package `cryptography`.
"""

from __future__ import annotations

import hashlib

import numpy as np

from fedhpc.lazy import lazy

_x25519 = lazy("cryptography.hazmat.primitives.asymmetric.x25519", "secure")
_aead = lazy("cryptography.hazmat.primitives.ciphers.aead", "secure")
_ciphers = lazy("cryptography.hazmat.primitives.ciphers", "secure")

KEY_BYTES = 32
SEAL_BYTES = 16  # by which a sealed message is longer
_PIECE = 2**16  # numbers of a stream at a time, so that they stay in the cache
_ZEROS = memoryview(bytes(8 * _PIECE))


def require() -> None:
    """UserError where the package `cryptography` is missing."""
    assert _x25519.X25519PrivateKey


def public_key(private: bytes) -> bytes:
    """The public key of a private one of 32 bytes."""
    key: bytes = _x25519.X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    return key


def agree(private: bytes, public: bytes, purpose: bytes) -> bytes:
    """The key that two clients share for one purpose, 32 bytes: each makes it of its private key and the other's."""
    private_key = _x25519.X25519PrivateKey.from_private_bytes(private)
    secret = private_key.exchange(_x25519.X25519PublicKey.from_public_bytes(public))
    return hashlib.sha256(secret + purpose).digest()


def seal(key: bytes, sender: int, receiver: int, message: bytes) -> bytes:
    """A message that only who has the key can read, and that nobody can change. A sender seals once with a key."""
    nonce = sender.to_bytes(4, "big") + receiver.to_bytes(4, "big") + bytes(4)
    sealed: bytes = _aead.ChaCha20Poly1305(key).encrypt(nonce, message, None)
    return sealed


def unseal(key: bytes, sender: int, receiver: int, sealed: bytes) -> bytes:
    """The message that was sealed. Raises cryptography's InvalidTag where it, the sender or the receiver is another."""
    nonce = sender.to_bytes(4, "big") + receiver.to_bytes(4, "big") + bytes(4)
    message: bytes = _aead.ChaCha20Poly1305(key).decrypt(nonce, sealed, None)
    return message


def add_stream(values: np.ndarray, key: bytes, begin: int, sign: int) -> None:
    """Add a key's stream of random integers to `values`, int64 (n,), in place and modulo 2^64, or subtract it.

    begin: the number of the first coordinate, which is even: a block of the cipher has two numbers. sign: 1 or -1.
    """
    assert begin % 2 == 0
    counter = _ciphers.modes.CTR((begin // 2).to_bytes(16, "big"))
    stream = _ciphers.Cipher(_ciphers.algorithms.AES(key), counter).encryptor()
    buffer = bytearray(8 * min(_PIECE, len(values)) + 15)  # the cipher asks for room beyond what it writes
    for first in range(0, len(values), _PIECE):
        piece = values[first : first + _PIECE]
        stream.update_into(_ZEROS[: piece.nbytes], buffer)
        numbers = np.frombuffer(buffer, dtype="<i8", count=len(piece))
        if sign > 0:
            piece += numbers
        else:
            piece -= numbers

"""Keys of masked sums: X25519 between two clients, HKDF-SHA256 for everything that is derived, AES-256-GCM for boxes.

Whoever seals a box under a derived key takes the nonce from what the box answers to, so that no nonce serves for two
texts, also where a talk begins again.

References:
    Adam Langley, Mike Hamburg and Sean Turner. "Elliptic Curves for Security." RFC 7748, 2016.
    Hugo Krawczyk and Pasi Eronen. "HMAC-based Extract-and-Expand Key Derivation Function (HKDF)." RFC 5869, 2010.
    Morris Dworkin. "Recommendation for Block Cipher Modes of Operation: Galois/Counter Mode." NIST SP 800-38D, 2007.
"""

from __future__ import annotations

from lichen.core.masks.layout import SECRET, frame

__all__ = ["agree", "derive", "hkdf", "public_of", "seal", "unseal"]


def hkdf(secret: bytes, info: bytes, size: int, salt: bytes | None = None) -> bytes:
    """``size`` bytes that follow from a secret and its purpose."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=hashes.SHA256(), length=size, salt=salt, info=info).derive(secret)


def derive(secret: bytes, *purpose: bytes | int | str) -> bytes:
    """A key of 32 bytes for one purpose."""
    return hkdf(secret, frame("lichen masks", *purpose), SECRET)


def public_of(private: bytes) -> bytes:
    """The X25519 public key of a private one, 32 bytes each."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes) -> bytes | None:
    """What two clients have in common, 32 bytes; None where it would be zero, for then everybody knows it."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return None


def seal(key: bytes, nonce: bytes, body: bytes, associated: bytes) -> bytes:
    """AES-256-GCM: the body's bytes encrypted, then a tag of 16 over them and what is associated."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key).encrypt(nonce, body, associated)


def unseal(key: bytes, nonce: bytes, sealed: bytes, associated: bytes) -> bytes | None:
    """The body of a box; None where a bit of it, or of what is associated, is another."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(nonce, sealed, associated)
    except InvalidTag:
        return None

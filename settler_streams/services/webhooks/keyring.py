"""Secrets at rest: AES-256-GCM under a named key, bound to the row that they belong to.

A key is replaced by putting a new one before it in ``SETTLER_WEBHOOK_KEYS``: what is stored is then encrypted anew as
couriers come by, within a day, and after that the old key can go.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from settler_streams.errors import ConfigurationError
from settler_streams.settings import Settings

NONCE_BYTES = 12
"""Random; the 2^32 encryptions that one key allows are more than there will be webhooks."""


class Sealed(NamedTuple):
    """An encrypted secret: the nonce and then the ciphertext, and the name of the key."""

    key_id: str
    blob: bytes


class KeyRing:
    """The keys of the settings."""

    def __init__(self, settings: Settings) -> None:
        self._keys = {name: AESGCM(key) for name, key in settings.webhook_keys_by_name().items()}
        self.newest = next(iter(self._keys), None)
        """The name of the key that encrypts; None without any."""

    def seal(self, secret: bytes, owner: str) -> Sealed:
        """Encrypt a secret of ``owner``, a row's identity; it opens only as that owner's.

        Raises:
            ConfigurationError: there is no key.
        """
        if self.newest is None:
            raise ConfigurationError("webhooks need a key that encrypts their secrets: set SETTLER_WEBHOOK_KEYS")
        nonce = secrets.token_bytes(NONCE_BYTES)
        return Sealed(self.newest, nonce + self._keys[self.newest].encrypt(nonce, secret, owner.encode()))

    def open(self, sealed: Sealed, owner: str) -> bytes:
        """Decrypt a secret of ``owner``.

        Raises:
            ConfigurationError: its key is not among ours, or is another one of the same name.
        """
        key = self._keys.get(sealed.key_id)
        if key is None:
            raise ConfigurationError(
                f"SETTLER_WEBHOOK_KEYS has no key {sealed.key_id!r}, which secrets are stored under"
            )
        try:
            return key.decrypt(sealed.blob[:NONCE_BYTES], sealed.blob[NONCE_BYTES:], owner.encode())
        except InvalidTag as error:
            raise ConfigurationError(
                f"a webhook secret does not open: key {sealed.key_id!r} is not what it was, or the row was altered"
            ) from error

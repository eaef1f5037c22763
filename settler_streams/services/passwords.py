"""Passwords: hashed with Argon2id, in a thread, since one hash takes tens of milliseconds by design."""

from __future__ import annotations

import asyncio

import argon2

from settler_streams.errors import InvalidRequestError

PASSWORD_CHARS_MIN, PASSWORD_CHARS_MAX = 8, 1024
"""The lower bound is that of NIST SP 800-63B; the upper one keeps hashing from becoming someone's lever."""

_HASHER = argon2.PasswordHasher()


async def hash_password(password: str) -> str:
    """The password's hash in PHC string form, with its own salt and parameters.

    Raises:
        InvalidRequestError: the password is too short or too long.
    """
    if not PASSWORD_CHARS_MIN <= len(password) <= PASSWORD_CHARS_MAX:
        raise InvalidRequestError(f"a password has {PASSWORD_CHARS_MIN} to {PASSWORD_CHARS_MAX} characters")
    return await asyncio.to_thread(_HASHER.hash, password)


async def verify_password(password_hash: str, password: str) -> bool:
    """Whether ``password`` is the one that was hashed."""
    if len(password) > PASSWORD_CHARS_MAX:
        return False
    try:
        return await asyncio.to_thread(_HASHER.verify, password_hash, password)
    except argon2.exceptions.VerifyMismatchError:
        return False

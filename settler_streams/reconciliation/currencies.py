"""How many fractional digits a currency has (ISO 4217, "minor unit")."""

from __future__ import annotations

DEFAULT_EXPONENT = 2

EXPONENTS = {
    **dict.fromkeys(
        (
            "BIF",
            "CLP",
            "DJF",
            "GNF",
            "ISK",
            "JPY",
            "KMF",
            "KRW",
            "PYG",
            "RWF",
            "UGX",
            "UYI",
            "VND",
            "VUV",
            "XAF",
            "XOF",
            "XPF",
        ),
        0,
    ),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
    **dict.fromkeys(("CLF", "UYW"), 4),
}
"""The currencies that differ from :data:`DEFAULT_EXPONENT`."""


def exponent(currency: str) -> int:
    """The number of fractional digits of ``currency``."""
    return EXPONENTS.get(currency, DEFAULT_EXPONENT)


def major_text(amount_minor: int, currency: str) -> str:
    """An amount in major units, such as ``-12.34``, exact."""
    digits = exponent(currency)
    whole, fraction = divmod(abs(amount_minor), 10**digits)
    sign = "-" if amount_minor < 0 else ""
    return f"{sign}{whole}.{fraction:0{digits}d}" if digits else f"{sign}{whole}"

"""Where a webhook may go: rules for its URL, and for the addresses that its host turns out to have.

The URL is checked when a webhook is made. What counts is the second check, at the moment of connecting: a name may
resolve to anything by then, and the connection goes to the very address that was checked.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from settler_streams.errors import InvalidRequestError
from settler_streams.settings import Settings

URL_LENGTH_MAX = 2048
_PRINTABLE = re.compile(r"[!-~]+")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*")
_PORTS = {"https": 443, "http": 80}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What no release of Python 3.11, or not each, knows as private.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # RFC 6890: protocol assignments; some clouds answer there with a machine's credentials
            "::/96",  # RFC 4291, 2.5.5.1: IPv4-compatible, deprecated
            "64:ff9b:1::/48",  # RFC 8215: translation to IPv4 as a network likes it
            "3fff::/20",  # RFC 9637: documentation
            "5f00::/16",  # RFC 9602: segment routing within a network
            "fec0::/10",  # RFC 3879: site-local, deprecated
        ),
    )
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Destination:
    """A URL, taken apart."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query."""

    @property
    def authority(self) -> str:
        """Host and port as the header ``host`` names them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Rules:
    """What the settings allow."""

    allow_http: bool
    allow_private: bool

    @classmethod
    def of(cls, settings: Settings) -> Rules:
        """The rules of a deployment."""
        return cls(settings.webhook_allow_http, settings.webhook_allow_private)

    def destination(self, url: str) -> Destination:
        """Take a URL apart.

        Raises:
            InvalidRequestError: it is none that a webhook may have; the message says why.
        """
        if len(url) > URL_LENGTH_MAX or _PRINTABLE.fullmatch(url) is None:
            raise InvalidRequestError(f"url: at most {URL_LENGTH_MAX} printable ASCII characters without spaces")
        try:
            parts = urlsplit(url)
            port, host = parts.port, (parts.hostname or "").rstrip(".")
        except ValueError as error:
            raise InvalidRequestError(f"url: {error}") from error
        if parts.scheme not in _PORTS or port == 0:
            raise InvalidRequestError("url: https://host[:port]/path")
        if parts.username is not None or parts.password is not None or parts.fragment:
            raise InvalidRequestError("url: no user, password or fragment")
        literal = _literal(host)
        if literal is None and _HOST.fullmatch(host) is None:
            raise InvalidRequestError("url: its host is a name (letters, digits, dots, hyphens) or an IP address")
        if literal is not None and not self.allows(literal):
            raise InvalidRequestError(f"url: {host} is not a public address")
        if parts.scheme == "http" and not self._allows_http(host, literal):
            raise InvalidRequestError("url: https only")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return Destination(parts.scheme, host, port or _PORTS[parts.scheme], target)

    def allows(self, address: Address) -> bool:
        """Whether a connection may go to ``address``."""
        if address.is_multicast or address.is_unspecified:
            return False
        return self.allow_private or all(is_public(one) for one in (address, *_embedded(address)))

    def _allows_http(self, host: str, literal: Address | None) -> bool:
        loopback = host == "localhost" or (literal is not None and literal.is_loopback)
        return self.allow_http or (self.allow_private and loopback)


def is_public(address: Address) -> bool:
    """Whether ``address`` is one of the global internet's."""
    return address.is_global and not address.is_multicast and not any(address in network for network in _NOT_PUBLIC)


def _embedded(address: Address) -> list[Address]:
    """IPv4 addresses that a gateway would turn an IPv6 one into."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found: list[Address | None] = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [one for one in found if one is not None]


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None

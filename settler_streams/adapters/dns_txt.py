"""TXT records of the DNS, asked of the system's resolver or of those that are given."""

from __future__ import annotations

import dns.asyncresolver
import dns.exception
import dns.nameserver
import dns.resolver

from settler_streams.errors import UnavailableError

ANSWERED_WITHIN_S = 5.0
"""Over all resolvers and their retries."""


class DnsTxtRecords:
    """Asks anew each time: whoever has just set a record wants to see it found."""

    def __init__(self, nameservers: str | None = None) -> None:
        """``nameservers``: ``address:port``, comma-separated; by default those of the system."""
        self._nameservers = [_nameserver(each) for each in nameservers.split(",")] if nameservers else None

    async def of(self, name: str) -> list[str]:
        """The texts of the TXT records at ``name``; empty when there is none.

        Raises:
            UnavailableError: no resolver gave an answer within :data:`ANSWERED_WITHIN_S`.
        """
        try:
            resolver = dns.asyncresolver.Resolver(configure=self._nameservers is None)
            if self._nameservers is not None:
                resolver.nameservers = self._nameservers
            answer = await resolver.resolve(
                name, "TXT", search=False, raise_on_no_answer=False, lifetime=ANSWERED_WITHIN_S
            )
        except dns.resolver.NXDOMAIN:
            return []
        except (dns.exception.DNSException, OSError) as error:
            raise UnavailableError(f"the DNS gave no answer about {name}: {error}") from error
        return [b"".join(record.strings).decode(errors="replace") for record in answer.rrset or ()]


def _nameserver(text: str) -> dns.nameserver.Do53Nameserver:
    address, _, port = text.rpartition(":")
    return dns.nameserver.Do53Nameserver(address.strip("[]"), int(port))

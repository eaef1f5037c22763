"""A name server over UDP that knows some TXT records, for tests that ask the DNS."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rrset


class DnsServer(asyncio.DatagramProtocol):
    """Answers from ``records``; a name that is not there does not exist. ``asked`` are the names in their order."""

    def __init__(self) -> None:
        self.records: dict[str, list[str]] = {}
        self.failing = False
        self.asked: list[str] = []
        self.address = ""

    @classmethod
    @contextlib.asynccontextmanager
    async def listening(cls) -> AsyncIterator[DnsServer]:
        """A server on a free port of the loopback interface; ``address`` is where."""
        loop = asyncio.get_running_loop()
        transport, server = await loop.create_datagram_endpoint(cls, local_addr=("127.0.0.1", 0))
        server.address = "{}:{}".format(*transport.get_extra_info("sockname"))
        try:
            yield server
        finally:
            transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        name = query.question[0].name
        key = name.to_text(omit_final_dot=True)
        self.asked.append(key)
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        if self.failing:
            response.set_rcode(dns.rcode.SERVFAIL)
        elif key not in self.records:
            response.set_rcode(dns.rcode.NXDOMAIN)
        elif texts := self.records[key]:
            response.answer.append(dns.rrset.from_text(name, 60, "IN", "TXT", *texts))
        self._transport.sendto(response.to_wire(), address)

"""Sockets of the daemon: who asks, where answers go, and how many a sender may cause."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from bridge.osc import MAX_PACKET, Framing, Malformed

MAX_CONNECTIONS = 64
MAX_UNSENT = 1 << 20  # bytes that may wait to be sent; a TCP client with more is cut off
RECEIVE_BUFFER = 4 << 20  # bytes; the system gives what it allows

Value = TypeVar("Value")


@dataclass(frozen=True)
class UdpPeer:
    """A UDP address. Equal where host and port are, so it can be a key."""

    host: str
    port: int
    transport: asyncio.DatagramTransport = field(compare=False, repr=False)

    def send(self, packet: bytes) -> None:
        if self.transport.get_write_buffer_size() > MAX_UNSENT:  # type: ignore[attr-defined]
            return  # lost, as UDP loses what does not fit
        self.transport.sendto(packet, (self.host, self.port))

    def at(self, port: int) -> UdpPeer:
        """The same host at another port."""
        return UdpPeer(self.host, port, self.transport)


@dataclass(frozen=True, eq=False)
class TcpPeer:
    """A TCP connection; a key as long as it lives. udp: how its host is reached at a UDP port."""

    host: str
    port: int
    transport: asyncio.Transport = field(repr=False)
    framing: Framing = field(repr=False)
    udp: asyncio.DatagramTransport = field(repr=False)

    def send(self, packet: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.transport.get_write_buffer_size() > MAX_UNSENT:
            self.transport.abort()  # it does not read, and must not fill our memory
            return
        self.transport.write(self.framing.frame(packet))

    def at(self, port: int) -> UdpPeer:
        """The same host at a UDP port."""
        return UdpPeer(self.host, port, self.udp)


Peer = UdpPeer | TcpPeer
Receive = Callable[[Peer, bytes], None]
Refuse = Callable[[Peer, Malformed, int], None]
Closed = Callable[[Peer], None]


class Udp(asyncio.DatagramProtocol):
    """Hands datagrams on."""

    def __init__(self, receive: Receive):
        self.receive = receive
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, address: tuple[Any, ...]) -> None:
        if self.transport is not None and data:
            self.receive(UdpPeer(str(address[0]), int(address[1]), self.transport), data)


class Tcp(asyncio.Protocol):
    """Hands the packets of a connection on; one that cannot be followed is told so and closed."""

    def __init__(
        self,
        receive: Receive,
        refuse: Refuse,
        closed: Closed,
        connections: set[TcpPeer],
        udp: asyncio.DatagramTransport,
    ):
        self.receive, self.refuse, self.closed = receive, refuse, closed
        self.connections, self.udp = connections, udp
        self.peer: TcpPeer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if len(self.connections) >= MAX_CONNECTIONS:
            transport.abort()
            return
        host, port = transport.get_extra_info("peername")[:2]
        self.peer = TcpPeer(str(host), int(port), transport, Framing(), self.udp)
        self.connections.add(self.peer)

    def data_received(self, data: bytes) -> None:
        if self.peer is None:
            return
        try:
            for packet in self.peer.framing.feed(data):
                self.receive(self.peer, packet)
        except Malformed as error:
            self.refuse(self.peer, error, len(data))
            self.peer.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self.peer is not None:
            self.connections.discard(self.peer)
            self.closed(self.peer)


async def listen(
    hosts: list[str], port: int, receive: Receive, refuse: Refuse, closed: Closed
) -> list[asyncio.BaseTransport | asyncio.Server]:
    """Opens UDP and TCP on every host; returns what to close. Raises OSError where a port is taken."""
    loop = asyncio.get_running_loop()
    opened: list[asyncio.BaseTransport | asyncio.Server] = []
    connections: set[TcpPeer] = set()
    try:
        for host in hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            udp = socket.socket(family, socket.SOCK_DGRAM)
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            if family == socket.AF_INET6:
                udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            udp.setblocking(False)
            try:
                udp.bind((host, port))
            except OSError:
                udp.close()
                raise
            transport, _ = await loop.create_datagram_endpoint(lambda: Udp(receive), sock=udp)
            transport.max_size = MAX_PACKET  # type: ignore[attr-defined]
            opened.append(transport)
            server = await loop.create_server(
                lambda transport=transport: Tcp(receive, refuse, closed, connections, transport),  # type: ignore[misc]
                host,
                port,
            )
            opened.append(server)
    except OSError:
        for each in opened:
            each.close()
        raise
    return opened


class Bounded(Generic[Value]):
    """A table that forgets what was used least recently when it is full."""

    def __init__(self, size: int):
        self.size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Hashable, value: Value) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self.size:
            self._values.popitem(last=False)

    def drop(self, key: Hashable) -> None:
        self._values.pop(key, None)

    def items(self) -> list[tuple[Hashable, Value]]:
        return list(self._values.items())

    def __len__(self) -> int:
        return len(self._values)


@dataclass
class Bucket:
    """Allows `burst` at once and `rate` a second after that."""

    rate: float
    burst: float
    level: float = 0.0
    filled: float = 0.0

    def take(self) -> bool:
        now = time.monotonic()
        if not self.filled:
            self.level, self.filled = self.burst, now
        self.level = min(self.burst, self.level + (now - self.filled) * self.rate)
        self.filled = now
        if self.level < 1:
            return False
        self.level -= 1
        return True

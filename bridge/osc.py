"""OSC on the wire: a strict reading before python-osc sees a byte, and the two framings of TCP.

python-osc (1.10) hangs on a bundle whose element has a negative size, drops arguments of unknown type, and
waits for future timetags, so every packet is walked here first and single messages alone reach the library.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pythonosc import slip
from pythonosc.osc_message import OscMessage
from pythonosc.osc_message_builder import OscMessageBuilder

Value = str | int | float

MAX_PACKET = 1 << 16  # bytes; what a UDP datagram can hold
MAX_MESSAGES = 64  # in one bundle, all levels together
MAX_DEPTH = 4
MAX_ARGUMENTS = 128
BUNDLE = b"#bundle\0"
BUNDLE_HEAD = len(BUNDLE) + 8  # and the timetag
WILDCARDS = frozenset(b" #*,?[]{}")  # what OSC 1.0 keeps out of the addresses of methods
FIXED = {"i": 4, "f": 4, "h": 8, "d": 8, "T": 0, "F": 0}  # bytes of an argument; strings measure themselves
SLIP_END = slip.END[0]
FIRST_BYTES = (b"\0", slip.END, b"/", b"#")


class Malformed(Exception):
    """Bytes that are no OSC, or OSC that is refused unread; `code` is the protocol's, `str()` a sentence."""

    def __init__(self, code: str, sentence: str):
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Message:
    """An OSC message. tags: one letter per argument, of i f h d s T F; T and F arrive as 1 and 0."""

    address: str
    tags: str
    arguments: tuple[Value, ...]


def read_packet(packet: bytes) -> list[Message]:
    """The messages of a packet, those of bundles in order; timetags are not waited for.

    Raises Malformed for the whole packet where any part of it is not exactly as OSC 1.0 says, or is larger,
    deeper or more than the constants above.
    """
    if len(packet) > MAX_PACKET:
        raise Malformed("size", f"A packet holds at most {MAX_PACKET} bytes.")
    return list(_read(packet, 0))


def write_message(address: str, tags: str, arguments: Sequence[Value]) -> bytes:
    """The bytes of one message; `tags` has one letter of i f h d s per argument."""
    builder = OscMessageBuilder(address)
    for tag, argument in zip(tags, arguments, strict=True):
        builder.add_arg(argument.replace("\0", "") if isinstance(argument, str) else argument, tag)
    return builder.build().dgram


def _read(packet: bytes, depth: int) -> Iterator[Message]:
    if len(packet) == 0 or len(packet) % 4:
        raise Malformed("malformed", "The length of a packet must be a multiple of 4 and above 0.")
    if not packet.startswith(BUNDLE):
        yield _read_message(packet)
        return
    if depth == MAX_DEPTH:
        raise Malformed("size", f"Bundles may be nested {MAX_DEPTH} deep.")
    if len(packet) < BUNDLE_HEAD:
        raise Malformed("malformed", "A bundle ends before its timetag does.")
    count, position = 0, BUNDLE_HEAD
    while position < len(packet):
        (size,) = struct.unpack_from(">i", packet, position)
        position += 4
        if size <= 0 or size > len(packet) - position:
            raise Malformed("malformed", f"An element of a bundle cannot have the size {size}.")
        for message in _read(packet[position : position + size], depth + 1):
            count += 1
            if count > MAX_MESSAGES:
                raise Malformed("size", f"A bundle holds at most {MAX_MESSAGES} messages.")
            yield message
        position += size


def _read_message(packet: bytes) -> Message:
    raw, position = _string(packet, 0)
    if not raw.startswith(b"/") or any(byte < 0x21 or byte > 0x7E for byte in raw if byte != 0x20):
        raise Malformed("malformed", "An address must begin with / and be printable ASCII.")
    if not WILDCARDS.isdisjoint(raw):
        raise Malformed("wildcard", "Wildcards and spaces in addresses are refused.")
    if position == len(packet):  # old senders leave the type tags out where there are no arguments
        return Message(raw.decode("ascii"), "", ())
    raw_tags, position = _string(packet, position)
    tags = raw_tags.decode("ascii", "replace")
    if not tags.startswith(","):
        raise Malformed("malformed", "The type tags must begin with a comma.")
    tags = tags[1:]
    if len(tags) > MAX_ARGUMENTS:
        raise Malformed("size", f"A message holds at most {MAX_ARGUMENTS} arguments.")
    for tag in tags:
        if tag == "s":
            text, position = _string(packet, position)
            _check_text(text)
        elif tag in FIXED:
            position += FIXED[tag]
        else:
            raise Malformed("type", "Arguments may be of the types i, f, h, d, s, T and F.")
    if position != len(packet):
        raise Malformed("malformed", "The arguments do not end where the message does.")
    message = OscMessage(packet)
    arguments = tuple(int(value) if isinstance(value, bool) else value for value in message.params)
    return Message(message.address, tags, arguments)


def _string(packet: bytes, start: int) -> tuple[bytes, int]:
    """An OSC string from `start` and the position after its padding."""
    stop = packet.find(b"\0", start)
    end = start + ((stop - start) // 4 + 1) * 4
    if stop < 0 or end > len(packet) or any(packet[stop:end]):
        raise Malformed("malformed", "A string does not end within the packet, padded with zeros.")
    return packet[start:stop], end


def _check_text(text: bytes) -> None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("malformed", "A string is not UTF-8.") from None


class Framing:
    """The packets in a TCP stream: length prefixes (OSC 1.0, liblo) or SLIP (OSC 1.1), by the first byte.

    A length begins with a zero byte, since no packet has 16 MB; SLIP begins with END or with the packet.
    Anything else is no OSC: a web page that posts to this port must not get a word in after its HTTP header.
    """

    def __init__(self) -> None:
        self.slip: bool | None = None
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The packets that are complete now. Raises Malformed where the stream cannot be followed further."""
        if self.slip is None and data[:1] not in FIRST_BYTES:
            raise Malformed("malformed", "A stream must begin with a length, or with SLIP's END.")
        self._buffer += data
        if self.slip is None:
            self.slip = self._buffer[0] != 0
        return list(self._slip_packets() if self.slip else self._long_packets())

    def frame(self, packet: bytes) -> bytes:
        """A packet as the other side speaks."""
        return slip.encode(packet) if self.slip else struct.pack(">I", len(packet)) + packet

    def _long_packets(self) -> Iterator[bytes]:
        while len(self._buffer) >= 4:
            (size,) = struct.unpack_from(">I", self._buffer)
            if not 0 < size <= MAX_PACKET:
                raise Malformed("size", f"A packet holds 1 to {MAX_PACKET} bytes.")
            if len(self._buffer) < 4 + size:
                return
            yield bytes(self._buffer[4 : 4 + size])
            del self._buffer[: 4 + size]

    def _slip_packets(self) -> Iterator[bytes]:
        while (end := self._buffer.find(SLIP_END)) >= 0:
            raw = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            if raw:
                try:
                    yield slip.decode(raw)
                except slip.ProtocolError:
                    raise Malformed("malformed", "The SLIP escapes cannot be followed.") from None
        if len(self._buffer) > 2 * MAX_PACKET:
            raise Malformed("size", f"A packet holds at most {MAX_PACKET} bytes.")

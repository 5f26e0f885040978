"""Bytes from anywhere: what is OSC is read as python-osc reads it, everything else is refused."""

from __future__ import annotations

import random
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pythonosc import slip
from pythonosc.osc_bundle_builder import IMMEDIATELY, OscBundleBuilder
from pythonosc.osc_message_builder import OscMessageBuilder

from bridge.osc import MAX_PACKET, Framing, Malformed, Message, Value, read_packet, write_message


def refused(packet: bytes) -> str:
    with pytest.raises(Malformed) as error:
        read_packet(packet)
    return error.value.code


def bundle(*elements: bytes, timetag: bytes = b"\0\0\0\0\0\0\0\1") -> bytes:
    return b"#bundle\0" + timetag + b"".join(struct.pack(">i", len(e)) + e for e in elements)


HELLO = write_message("/backline/hello", "s", ["me"])


def test_a_message_arrives_as_python_osc_builds_it() -> None:
    builder = OscMessageBuilder("/a/b")
    for value, tag in (("wört", "s"), (-3, "i"), (0.5, "f"), (1 << 40, "h"), (0.1, "d"), (True, "T")):
        builder.add_arg(value, tag)
    assert read_packet(builder.build().dgram) == [
        Message("/a/b", "sifhdT", ("wört", -3, 0.5, 1 << 40, 0.1, 1))
    ]
    assert read_packet(b"/a\0\0") == [Message("/a", "", ())]


def test_bundles_are_flattened_and_their_timetags_are_not_waited_for() -> None:
    inner = OscBundleBuilder(IMMEDIATELY)
    inner.add_content(OscMessageBuilder("/inner").build())
    future = bundle(HELLO, inner.build().dgram, timetag=b"\xff" * 8)
    started = time.monotonic()
    assert [m.address for m in read_packet(future)] == ["/backline/hello", "/inner"]
    assert time.monotonic() - started < 0.1
    assert read_packet(bundle()) == []


@pytest.mark.parametrize(
    ("code", "packet"),
    [
        ("malformed", b""),
        ("malformed", b"/a\0"),
        ("malformed", b"abc\0"),
        ("malformed", b"/abc"),  # never ends
        ("malformed", b"/a\0x"),  # padded with something
        ("malformed", b"/\xff\0\0"),
        ("malformed", HELLO[:-4]),
        ("malformed", HELLO + b"\0\0\0\0"),
        ("malformed", b"/a\0\0s\0\0\0me\0\0"),  # no comma
        ("malformed", b"/a\0\0,s\0\0\xff\0\0\0"),  # not UTF-8
        ("malformed", b"#bundle\0" + b"\0" * 4),
        ("malformed", b"#bundle\0" + b"\0" * 8 + struct.pack(">i", -4)),  # hangs python-osc 1.10 for ever
        ("malformed", b"#bundle\0" + b"\0" * 8 + struct.pack(">i", 0)),
        ("malformed", b"#bundle\0" + b"\0" * 8 + struct.pack(">i", 1 << 30) + HELLO),
        ("malformed", b"#bundle\0" + b"\0" * 8 + struct.pack(">i", 6) + HELLO),
        ("malformed", b"#bundle\0" + b"\0" * 10),
        ("wildcard", b"/backline/*\0,\0\0\0"),
        ("wildcard", b"/backline/hell?\0,\0\0\0"),
        ("wildcard", b"/a{b,c}\0,\0\0\0"),
        ("wildcard", b"/a b\0\0\0\0,\0\0\0"),
        ("type", b"/a\0\0,b\0\0\0\0\0\0"),
        ("type", b"/a\0\0,[]\0"),
        ("type", b"/a\0\0,N\0\0"),
        ("size", bundle(*[HELLO] * 65)),
        ("size", bundle(bundle(bundle(bundle(bundle(HELLO)))))),
        ("size", b"/a\0\0" + b"," + b"T" * 129 + b"\0\0"),
        ("size", b"/" + b"a" * MAX_PACKET + b"\0\0\0"),
    ],
)
def test_bytes_that_are_not_exactly_osc_are_refused(code: str, packet: bytes) -> None:
    assert refused(packet) == code


@given(st.binary(max_size=400))
@settings(max_examples=600, deadline=1000)
def test_no_bytes_do_anything_but_parse_or_be_refused(data: bytes) -> None:
    for packet in (data, b"/backline" + data, b"#bundle\0" + data, bundle(data)):
        try:
            read_packet(packet)
        except Malformed as error:
            assert error.code in ("malformed", "size", "type", "wildcard")


def test_mutations_of_valid_packets_parse_or_are_refused_and_never_hang() -> None:
    rng = random.Random(1)
    valid = [
        HELLO,
        write_message("/backline/job/fill", "ssssf", ["a", "/songs", "piano", "bpm", 120.0]),
        bundle(HELLO, bundle(HELLO, HELLO)),
    ]
    started = time.monotonic()
    for _ in range(8000):
        packet = bytearray(rng.choice(valid))
        for _ in range(rng.randrange(1, 5)):
            packet[rng.randrange(len(packet))] = rng.choice((0, 255, 44, 0x80, rng.randrange(256)))
        try:
            messages = read_packet(bytes(packet[: rng.randrange(len(packet) + 1)]))
        except Malformed:
            continue
        for message in messages:
            assert message.address.startswith("/") and len(message.tags) == len(message.arguments)
    assert time.monotonic() - started < 10


values = st.one_of(
    st.tuples(st.just("s"), st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)),
    st.tuples(st.just("i"), st.integers(-(2**31), 2**31 - 1)),
    st.tuples(st.just("h"), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just("d"), st.floats(allow_nan=False)),
)


@given(st.lists(values, max_size=12))
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back(arguments: list[tuple[str, Value]]) -> None:
    tags = "".join(tag for tag, _ in arguments)
    plain = tuple(value for _, value in arguments)
    assert read_packet(write_message("/a", tags, plain)) == [Message("/a", tags, plain)]


@given(
    st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=6),
    st.booleans(),
    st.integers(1, 50),
)
@settings(max_examples=150, deadline=None)
def test_a_stream_gives_its_packets_however_it_is_cut(packets: list[bytes], by_slip: bool, cut: int) -> None:
    packets = [b"/" + packet for packet in packets]
    if by_slip:
        stream = b"".join(slip.encode(packet) for packet in packets)
    else:
        stream = b"".join(struct.pack(">I", len(packet)) + packet for packet in packets)
    framing = Framing()
    found = [
        packet for start in range(0, len(stream), cut) for packet in framing.feed(stream[start : start + cut])
    ]
    assert found == packets
    assert framing.slip == by_slip
    other = Framing()
    assert other.feed(framing.frame(b"/x\0\0")) == [b"/x\0\0"]


@pytest.mark.parametrize(
    "stream",
    [
        struct.pack(">I", MAX_PACKET + 1),
        struct.pack(">I", 0),
        b"POST / HTTP/1.1\r\n\r\n\xc0/backline/hello\0",
        b"\x01",
        b"\xc0/a\xdb\x01\xc0",
        b"\xc0" + b"/" * (2 * MAX_PACKET + 1),
    ],
)
def test_a_stream_that_cannot_be_followed_is_refused(stream: bytes) -> None:
    with pytest.raises(Malformed):
        Framing().feed(stream)

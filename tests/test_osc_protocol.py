"""docs/osc.md is the contract: its tables are read here and compared with what the code checks and sends."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.daemon import HANDLERS
from bridge.osc import Message, read_packet
from bridge.protocol import (
    ENVELOPE,
    ERRORS,
    OPTIONS,
    REPLIES,
    REQUESTS,
    Refused,
    check_request,
    named,
    reply,
    take_envelope,
)

DOCS = Path(__file__).resolve().parents[1] / "docs" / "osc.md"


def table(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading of docs/osc.md that begins so, without its head."""
    text = DOCS.read_text("utf-8")
    lines = text[re.search(rf"^#+ {heading}.*$", text, re.M).end() :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line.strip("|"))])
    return rows


def requests() -> list[list[str]]:
    return table("Requests")


def test_the_requests_are_those_of_the_docs() -> None:
    assert {row[0]: (row[1], row[3]) for row in requests()} == REQUESTS
    assert set(HANDLERS) == set(REQUESTS)


def test_the_daemons_messages_are_those_of_the_docs() -> None:
    assert {row[0]: row[1] for row in table("What the daemon says")} == REPLIES
    assert {answer for _, answer in REQUESTS.values()} <= set(REPLIES)
    assert not set(REQUESTS) & set(REPLIES)


def test_the_options_are_those_of_the_docs() -> None:
    assert {row[0]: (row[1], tuple(row[2].split())) for row in table("Options")} == OPTIONS


def test_the_errors_are_those_of_the_docs() -> None:
    assert {row[0]: row[1] for row in table("Errors")} == ERRORS


def test_the_pairs_for_any_request_are_those_of_the_docs() -> None:
    text = DOCS.read_text("utf-8")
    found = re.findall(r"^\| `(\w+)` `(\w)` \|", text, re.M)
    assert dict(found) == ENVELOPE


@pytest.mark.parametrize("row", requests(), ids=lambda row: row[0])
def test_every_example_of_the_docs_is_a_valid_request(row: list[str]) -> None:
    check_request(example(row))


def example(row: list[str], **replaced: str) -> Message:
    """The message that oscsend would send for a row's example, words replaced where asked."""
    tags, *words = row[2].split() if row[2] else [""]
    words = [replaced.get(word, word) for word in words]
    casts = {"s": str, "i": int, "f": float}
    return Message(row[0], tags, tuple(casts[tag](word) for tag, word in zip(tags, words, strict=True)))


def refusal(address: str, tags: str, *arguments: object) -> str:
    with pytest.raises(Refused) as refused:
        check_request(Message(address, tags, arguments))  # type: ignore[arg-type]
    assert str(refused.value).endswith((".", "?")) and "\n" not in str(refused.value)
    assert refused.value.code in ERRORS
    return refused.value.code


@pytest.mark.parametrize(
    ("code", "address", "tags", "arguments"),
    [
        ("unknown", "/backline/nothing", "", ()),
        ("arguments", "/backline/hello", "", ()),
        ("arguments", "/backline/job/status", "ss", ("a", "b")),
        ("arguments", "/backline/job/generate", "sfs", ("a", 5.0, "bpm")),
        ("arguments", "/backline/job/generate", "sfsf", ("a", 5.0, "tempo", 120.0)),
        ("arguments", "/backline/job/generate", "sfsfsf", ("a", 5.0, "bpm", 120.0, "bpm", 90.0)),
        ("arguments", "/backline/job/split", "sssf", ("a", "/m.wav", "bpm", 120.0)),
        ("arguments", "/backline/job/generate", "sfff", ("a", 5.0, 1.0, 120.0)),
        ("type", "/backline/hello", "i", (3,)),
        ("type", "/backline/job/generate", "ss", ("a", "ten")),
        ("type", "/backline/job/generate", "sfsf", ("a", 5.0, "takes", 1.5)),
        ("type", "/backline/job/generate", "sfss", ("a", 5.0, "bpm", "fast")),
        ("value", "/backline/job/generate", "sfsf", ("a", 5.0, "bpm", math.nan)),
        ("value", "/backline/job/generate", "sf", ("a", math.inf)),
        ("value", "/backline/job/generate", "sfsi", ("a", 5.0, "takes", 17)),
        ("value", "/backline/job/generate", "sfsi", ("a", 5.0, "seed", -1)),
        ("value", "/backline/job/generate", "sfss", ("a", 5.0, "priority", "urgent")),
        ("value", "/backline/job/status", "s", ("../etc",)),
        ("value", "/backline/job/status", "s", ("",)),
        ("value", "/backline/job/status", "s", (".hidden",)),
        ("value", "/backline/job/status", "s", ("a/b",)),
        ("value", "/backline/job/status", "s", ("a" * 65,)),
        ("value", "/backline/job/status", "s", ("a\n",)),
        ("value", "/backline/transport/set", "sf", ("flying", 1.0)),
        ("value", "/backline/subscription/add", "s", ("everything",)),
        ("value", "/backline/track/arm", "si", ("3", 2)),
        ("value", "/backline/track/rename", "ss", ("3", "a\tb")),
        ("size", "/backline/track/rename", "ss", ("3", "x" * 201)),
    ],
)
def test_what_is_wrong_is_refused_with_its_code(
    code: str, address: str, tags: str, arguments: tuple[object, ...]
) -> None:
    assert refusal(address, tags, *arguments) == code


def test_numbers_may_come_as_any_number_that_fits() -> None:
    for tags, values in (("sisf", ("a", 5, "takes", 2.0)), ("sdsh", ("a", 5.0, "takes", 2))):
        assert check_request(Message("/backline/job/generate", tags, values)) == {
            "id": "a",
            "seconds": 5.0,
            "takes": 2,
        }
    tempo = check_request(Message("/backline/tempo/set", "f", (97.80000305175781,)))  # 97.8 in 32 bits
    assert tempo == {"bpm": 97.8}


def test_the_pairs_for_any_request_are_taken_off_its_end() -> None:
    message = Message("/backline/job/status", "ssisss", ("a", "reply", 9000, "token", "secret"))
    message = Message(message.address, "ssiss", message.arguments)
    rest, envelope = take_envelope(message)
    assert rest == Message("/backline/job/status", "s", ("a",))
    assert envelope == {"reply": 9000, "token": "secret"}
    kept = Message("/backline/job/generate", "sfss", ("a", 5.0, "text", "token"))
    assert take_envelope(kept) == (kept, {})
    with pytest.raises(Refused, match="reply must be 1 to 65535"):
        take_envelope(Message("/backline/hello", "ssi", ("me", "reply", 70000)))


@pytest.mark.parametrize("address", REPLIES)
def test_messages_of_the_daemon_survive_the_way(address: str) -> None:
    head, _, more = REPLIES[address].partition("[")
    names = [part.split() for part in head.split(", ") if part.strip()]
    repeated = [part.split() for part in more.split("]")[0].split(", ")] if more else []
    values = {"s": "wört", "i": 7, "f": 0.5}
    arguments = [values[tag] for tag, _ in names] + 2 * [values[tag] for tag, _ in repeated]
    (message,) = read_packet(reply(address, *arguments))
    assert list(message.arguments) == arguments
    found = named(address, message.arguments)
    assert {name: values[tag] for tag, name in names}.items() <= found.items()
    assert len(found.get("more", [])) == 2 * len(repeated)


anything = st.one_of(
    st.tuples(st.just("s"), st.text(max_size=30)),
    st.tuples(st.sampled_from("ih"), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.sampled_from("fd"), st.floats()),
)


@given(st.sampled_from(sorted(REQUESTS)), st.lists(anything, max_size=9))
@settings(max_examples=200, deadline=None)
def test_no_arguments_do_anything_but_pass_or_be_refused(
    address: str, arguments: list[tuple[str, object]]
) -> None:
    message = Message(address, "".join(tag for tag, _ in arguments), tuple(value for _, value in arguments))  # type: ignore[arg-type]
    try:
        message, _ = take_envelope(message)
        check_request(message)
    except Refused as refused:
        assert refused.code in ERRORS

"""What the daemon says of itself and of the host: hello, models, tracks, tempo, transport, subscriptions."""

from __future__ import annotations

import asyncio
import importlib.metadata
from pathlib import Path
from typing import Any

from bridge import daemon_jobs
from bridge.daemon_net import Peer
from bridge.daemon_state import MAX_TRACKS, Daemon, background, client_of, model_state, publish, send
from bridge.models import list_bundles
from bridge.protocol import TOPICS, VERSION, Refused, reply
from engine.bundle import read_manifest
from engine.errors import BacklineError


def hello(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    if values.get("reply_port"):
        target = peer.at(values["reply_port"])
    if target != peer:
        daemon.reply_to.put(peer, target)
    else:
        daemon.reply_to.drop(peer)
    client_of(daemon, target).name = values["client"]
    engine = daemon.engine
    packet = reply(
        "/backline/welcome",
        VERSION,
        importlib.metadata.version("backline"),
        engine.state,
        engine.bundle or engine.model_name,
        daemon.config.device,
        engine.provider,
        engine.note,
        str(daemon.root.folder),
        *engine.capabilities,
    )
    send(daemon, target, packet)


def model_list(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    async def answer() -> None:
        entries = await asyncio.to_thread(_model_entries)
        for name, version, note, path in entries:
            loaded = daemon.engine.state == "loaded" and path == daemon.engine.model_path
            state = "loaded" if loaded else "available" if version else "broken"
            send(daemon, target, reply("/backline/model/entry", name, version, state, note))
        send(daemon, target, reply("/backline/model/listed", len(entries)))

    background(daemon, answer())


def _model_entries() -> list[tuple[str, str, str, str | None]]:
    """(name to load, version, licence or what is wrong, path) of every bundle; at most 64."""
    entries: list[tuple[str, str, str, str | None]] = []
    for path in list_bundles()[:64]:
        if path is not None and path.suffix == ".zip":
            entries.append((path.name, "zip", "", str(path)))
            continue
        try:
            manifest = read_manifest(path or _shipped())
        except BacklineError as error:
            entries.append((path.name if path else "default", "", str(error)[:200], str(path)))
            continue
        name = path.name if path else "default"
        entries.append((name, manifest.version, manifest.licence, None if path is None else str(path)))
    return entries


def _shipped() -> Path:
    import engine

    return Path(str(engine.__file__)).parent / "default_bundle"


def model_load(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    path = daemon_jobs.model_path(values["name"], daemon.config.model)
    engine = daemon.engine
    engine.model_name, engine.model_path = values["name"] or "default", path
    engine.state, engine.bundle = "loading", ""
    daemon_jobs.tell_worker(daemon, do="load", path=path)
    publish(daemon, "model", model_state(daemon), also=target)


def model_unload(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    daemon_jobs.tell_worker(daemon, do="unload")
    daemon.engine.state = "unloading"
    publish(daemon, "model", model_state(daemon), also=target)


def _track(daemon: Daemon, name: str) -> dict[str, Any]:
    if name not in daemon.tracks:
        if len(daemon.tracks) >= MAX_TRACKS:
            raise Refused("size", f"There are {MAX_TRACKS} tracks already: remove some.")
        daemon.tracks[name] = {}
    return daemon.tracks[name]


def track_arm(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    _track(daemon, values["track"])["armed"] = values["armed"]
    packet = reply("/backline/track/armed", values["track"], values["armed"])
    publish(daemon, "tracks", packet, also=target)


def track_rename(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    _track(daemon, values["track"])["name"] = values["name"]
    packet = reply("/backline/track/renamed", values["track"], values["name"])
    publish(daemon, "tracks", packet, also=target)


def track_mute(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    _track(daemon, values["track"])["muted"] = values["muted"]
    packet = reply("/backline/track/muted", values["track"], values["muted"])
    publish(daemon, "tracks", packet, also=target)


def track_remove(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    daemon.tracks.pop(values["track"], None)
    publish(daemon, "tracks", reply("/backline/track/removed", values["track"]), also=target)


def tempo_set(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    before = daemon.tempo[1] if daemon.tempo else 4
    daemon.tempo = (values["bpm"], values.get("beats_per_bar", before))
    publish(daemon, "tempo", reply("/backline/tempo/is", *daemon.tempo), also=target)


def transport_set(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    daemon.transport = (values["state"], values["seconds"])
    publish(daemon, "transport", reply("/backline/transport/is", *daemon.transport), also=target)


def subscribe(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    client_of(daemon, target).topics.add(values["topic"])
    send(daemon, target, reply("/backline/subscription/added", values["topic"]))
    for packet in _current(daemon, values["topic"]):
        send(daemon, target, packet)


def unsubscribe(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    client = daemon.clients.get(target)
    if client is not None:
        client.topics.discard(values["topic"])
    send(daemon, target, reply("/backline/subscription/removed", values["topic"]))


def _current(daemon: Daemon, topic: str) -> list[bytes]:
    """What a new subscriber of a topic is told at once."""
    assert topic in TOPICS
    if topic == "model":
        return [model_state(daemon)]
    if topic == "jobs":
        return [daemon_jobs.state_packet(job.final or job.row, job) for job in daemon.jobs.values()]
    if topic == "tempo":
        return [reply("/backline/tempo/is", *daemon.tempo)] if daemon.tempo else []
    if topic == "transport":
        return [reply("/backline/transport/is", *daemon.transport)] if daemon.transport else []
    packets = []
    for track, facts in daemon.tracks.items():
        words = {"name": "renamed", "armed": "armed", "muted": "muted"}
        packets += [reply(f"/backline/track/{words[fact]}", track, value) for fact, value in facts.items()]
    return packets

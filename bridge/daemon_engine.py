"""The daemon as an Engine: for whoever fills tracks of a host while the daemon holds the model.

Audio goes as wavs over the daemon's own folders; a job that is called off is cancelled there.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.client import Client, ClientJob, connect
from bridge.filling import Engine, Warn
from bridge.protocol import PORT
from engine.audio import Audio, read, write
from engine.errors import BacklineError
from engine.manifest import Quality
from engine.take import Callback

LOOK_SECONDS = 0.1  # between two looks at whether a job is called off
LOADING_SECONDS = 120.0  # that the daemon may take to open its model
CANCEL_SECONDS = 30.0  # that the daemon may take to end a job that is cancelled
STEM = "stem:"


@dataclass(frozen=True)
class DaemonEngine:
    """bridge.filling.Engine: jobs of the daemon on this machine's `port`. root: the daemon's folder."""

    port: int
    token: str | None
    root: Path
    capabilities: frozenset[str]
    stems: tuple[str, ...]
    warn: Warn
    quality: Quality | None = None

    def fill(
        self,
        context: Mapping[str, Audio],
        armed: Sequence[str],
        *,
        other: Audio | None = None,
        bpm: float | None = None,
        beats_per_bar: int = 4,
        first_beat: float = 0.0,
        chords: str | None = None,
        text: str | None = None,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> Mapping[str, Audio]:
        if other is not None and context and "mixture" not in self.capabilities:
            self.warn(f"The daemon's model hears only {', '.join(self.stems)}: it was not given the rest.")
            other = None
        options = self._options() | ({} if text is None else {"text": text})
        if bpm is not None and ("grid" in self.capabilities or chords is not None):
            options |= {"bpm": bpm, "beats_per_bar": beats_per_bar, "first_beat": first_beat}
        if chords is not None:
            options["chords"] = chords
        with self._folder() as folder:
            files = {name: _written(folder, name, part) for name, part in context.items()}
            if other is not None:
                options["other"] = _written(folder, "other material", other)
            return self._made(
                lambda client: client.fill(files, ",".join(armed), seed=seed, **options), callback
            )

    def split(self, mix: Audio, *, seed: int = 0, callback: Callback | None = None) -> Mapping[str, Audio]:
        with self._folder() as folder:
            file = _written(folder, "mix", mix)
            options = self._options()
            return self._made(lambda client: client.split(file, seed=seed, residual=1, **options), callback)

    def _options(self) -> dict[str, Any]:
        return {} if self.quality is None else {"quality": self.quality}

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        """A folder that the daemon may read."""
        try:
            folder = Path(tempfile.mkdtemp(prefix="host-", dir=self.root / "inputs"))
        except OSError as error:
            raise BacklineError(f"The daemon's folder {self.root} cannot be written: {error}.") from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _made(
        self, submit: Callable[[Client], Awaitable[ClientJob]], callback: Callback | None
    ) -> Mapping[str, Audio]:
        async def make() -> Mapping[str, Audio]:
            async with connect(port=self.port, token=self.token, name="track host") as client:
                job = await submit(client)
                ended = asyncio.ensure_future(job.result(keep=True))
                try:
                    while not ended.done():
                        await asyncio.wait({ended}, timeout=LOOK_SECONDS)
                        if callback is not None:
                            callback(job.phase or job.state, job.fraction)
                except BaseException:
                    await job.cancel()
                    await asyncio.wait({ended}, timeout=CANCEL_SECONDS)  # until then it reads its files
                    if not ended.cancel():
                        ended.exception()  # that it was cancelled is no news
                    raise
                result = await ended
                if result.note:
                    self.warn(result.note)
                stems = {name: read(path) for name, path in result.takes[0].files.items()}
                await job.fetched()
                return stems

        return asyncio.run(make())


def daemon_engine(
    port: int = PORT, *, token: str | None = None, quality: Quality | None = None, warn: Warn | None = None
) -> Engine:
    """The daemon on this machine as an Engine. Raises BacklineError without one, or where it has no model."""
    welcome = asyncio.run(_welcome(port, token))
    words = [str(word) for word in welcome["more"]]
    return DaemonEngine(
        port,
        token,
        Path(welcome["root"]),
        frozenset(word for word in words if not word.startswith(STEM)),
        tuple(word.removeprefix(STEM) for word in words if word.startswith(STEM)),
        warn or (lambda sentence: None),
        quality,
    )


async def _welcome(port: int, token: str | None) -> dict[str, Any]:
    """What the daemon says once its model is open."""
    async with connect(port=port, token=token, name="track host") as client:
        if client.welcome["state"] in ("unloaded", "failed"):
            await client.request("/backline/model/load", "", answer="/backline/model/state")
        until = asyncio.get_running_loop().time() + LOADING_SECONDS
        while not any(str(word).startswith(STEM) for word in client.welcome["more"]):
            if client.welcome["state"] == "failed" or asyncio.get_running_loop().time() > until:
                raise BacklineError(f"The daemon has no model: {client.welcome['note'] or 'it is loading'}.")
            await asyncio.sleep(LOOK_SECONDS)
            client.welcome = await client.request("/backline/hello", client.name, answer="/backline/welcome")
        return client.welcome


def _written(folder: Path, name: str, audio: Audio) -> str:
    path = folder / f"{name}.wav"
    write(path, audio)
    return str(path)

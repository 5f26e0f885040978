"""Reading a PyTorch checkpoint without running it.

A `.ckpt` is a pickle, and a pickle is a program. This reader interprets it with an unpickler that knows
tensors and plain values and nothing else: every other class or function it names becomes an inert placeholder
that is listed. Tensors stay on disk until `Checkpoint.read` asks for one, so a 12 GB checkpoint with
optimizer states costs the memory of the tensors that are used.

Formats: torch's zip archive (since 1.6), the older stream of pickles, and a tar, gzipped or not, that holds
either.
"""

from __future__ import annotations

import lzma
import os
import pickle
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch

from engine.errors import BacklineError

# How torch.save began before 1.6: a pickle of the number 0x1950a86a20f9469cfc6c, less its first bytes.
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
COPY_BLOCK = 1 << 22
# What zipfile and tarfile raise over damaged bytes: their own errors, and others where they trust a field.
DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,  # NotImplementedError among them
)

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Storage:
    """Where a run of numbers lies: a member of the zip archive, or a place in the older stream."""

    key: str
    dtype: torch.dtype
    size: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still on disk."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Placeholder:
    """Stands for an object that was not rebuilt. It accepts whatever a pickle does to it and ignores it."""

    origin = "an unknown object"

    def __new__(cls, *args: object, **kwargs: object) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{self.origin}, not rebuilt>"

    def _ignore(self, *args: object) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = __call__ = _ignore


class Plain(dict[Any, Any]):
    """A dictionary that a pickle can fill, and whose attributes it cannot set."""

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. `values`: the top of the pickle. `foreign`: what became placeholders."""

    path: Path
    values: dict[Any, Any]
    foreign: list[str]
    _load: Callable[[Storage], bytearray] = field(repr=False)

    def tensors(self, *roots: str) -> dict[str, LazyTensor | Placeholder]:
        """Name -> tensor under the first of `roots` that the top has, or of the top itself.

        A tensor that depends on a foreign object is its placeholder. Raises BacklineError where the root
        itself is one.
        """
        root = next((root for root in roots if root in self.values), None)
        state = self.values if root is None else self.values[root]
        if isinstance(state, Placeholder):
            raise BacklineError(f"{self.path}: its {root} is a foreign object ({state.origin}), not tensors.")
        if not isinstance(state, Mapping):
            raise BacklineError(f"{self.path}: its {root} holds no tensors.")
        return {
            str(name): value for name, value in state.items() if isinstance(value, LazyTensor | Placeholder)
        }

    def read(self, tensor: LazyTensor) -> torch.Tensor:
        """The tensor, read from disk now. Raises BacklineError where its bytes are not all there."""
        storage, empty = tensor.storage, 0 in tensor.shape
        steps = zip(tensor.shape, tensor.stride, strict=True)
        last = tensor.offset + sum((size - 1) * step for size, step in steps)
        negative = min(tensor.offset, *tensor.shape, *tensor.stride, 0) < 0
        if negative or (last >= storage.size and not empty):
            raise BacklineError(f"{self.path} is damaged: a tensor reaches past its data.")
        with _explained(self.path):
            data = self._load(storage)
        if len(data) != storage.size * storage.dtype.itemsize:
            raise BacklineError(f"{self.path} is damaged: the data of a tensor is incomplete.")
        if empty:
            return torch.empty(tensor.shape, dtype=storage.dtype)
        flat = torch.frombuffer(data, dtype=storage.dtype)
        return flat.as_strided(tensor.shape, tensor.stride, tensor.offset)


@contextmanager
def open_checkpoint(
    path: Path, *, scratch: Path | None = None, callback: Progress | None = None
) -> Iterator[Checkpoint]:
    """Open a checkpoint; its tensors can be read inside the `with`.

    scratch: a folder for the unpacked member of a tar, 4 to 13 GB for a released one (default: the system's
    temporary one); the copy has no name and is gone with the process. callback: fraction of the unpacking.
    Raises BacklineError, one sentence, for a file that is missing, empty, truncated or no checkpoint, and
    where `scratch` has no room for it.
    """
    path = Path(path)
    with ExitStack() as stack:
        with _explained(path):
            file = stack.enter_context(path.open("rb"))
            inner = _unpacked(path, file, scratch, stack, callback)
            checkpoint = _parse(path, inner)
        yield checkpoint


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What goes wrong in reading, as a sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise BacklineError(f"{path} does not exist.") from error
    except IsADirectoryError as error:
        raise BacklineError(f"{path} is a folder, not a checkpoint.") from error
    except DAMAGE as error:
        raise BacklineError(f"{path} is truncated or damaged: download it again.") from error
    except OSError as error:
        raise BacklineError(f"{path} cannot be read: {error.strerror or error}.") from error


@contextmanager
def _unpacking(path: Path, scratch: Path) -> Iterator[None]:
    """What goes wrong in writing the copy, which is not the archive's fault."""
    try:
        yield
    except OSError as error:
        raise BacklineError(f"{path} cannot be unpacked in {scratch}: {error.strerror or error}.") from error


def _unpacked(
    path: Path, file: IO[bytes], scratch: Path | None, stack: ExitStack, callback: Progress | None
) -> IO[bytes]:
    """The file itself, or the checkpoint inside it where it is a tar."""
    head = file.read(512)
    file.seek(0)
    if not (head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar"):
        return file
    total = path.stat().st_size
    folder = scratch or Path(tempfile.gettempdir())
    # A gzip cannot be read at random, so the checkpoint is unpacked once, into a file without a name.
    with _unpacking(path, folder):
        copy = cast(IO[bytes], stack.enter_context(tempfile.TemporaryFile(dir=folder)))  # noqa: SIM115
    names: list[str] = []
    taken = ""
    with tarfile.open(fileobj=file, mode="r:*") as archive:
        for member in archive:
            if not member.isfile() or not member.name.endswith((".ckpt", ".pt", ".pth")):
                continue
            names.append(member.name)
            source = archive.extractfile(member)
            # Among several, Lightning's `last` is the one that the release's configuration names.
            if source is None or (taken and Path(member.name).stem != "last"):
                continue
            taken = member.name
            copy.seek(0)
            copy.truncate()
            while block := source.read(COPY_BLOCK):
                with _unpacking(path, folder):
                    copy.write(block)
                if callback:
                    callback(f"unpacking {Path(taken).name}", min(1.0, file.tell() / total))
    if not taken:
        raise BacklineError(f"{path} is an archive that holds no checkpoint (.ckpt).")
    if len(names) > 1 and Path(taken).stem != "last":
        raise BacklineError(
            f"{path} holds several checkpoints ({', '.join(names)}): unpack the one you want."
        )
    with _unpacking(path, folder):
        copy.seek(0)  # writes what is still buffered
    return copy


def _parse(path: Path, file: IO[bytes]) -> Checkpoint:
    head = file.read(64)
    file.seek(0)
    if not head:
        raise BacklineError(f"{path} is empty.")
    if head.startswith(b"PK"):
        return _parse_zip(path, file)
    if head[2:].startswith(LEGACY_MAGIC):
        return _parse_legacy(path, file)
    raise BacklineError(f"{path} is no PyTorch checkpoint{_guess(head)}.")


def _guess(head: bytes) -> str:
    if head.lstrip().startswith(b"<"):
        return ": it is a web page, so the download went wrong"
    if head[8:9] == b"{":
        return ": it looks like a safetensors file"
    if head.startswith(b"{"):
        return ": it looks like JSON"
    if head.startswith(b"\x80"):
        return ": it is another kind of pickle"
    return ""


def _parse_zip(path: Path, file: IO[bytes]) -> Checkpoint:
    archive = zipfile.ZipFile(file)
    names = set(archive.namelist())
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if "manifest.json" in names:
        raise BacklineError(f"{path} is a Backline bundle already, not a checkpoint.")
    if len(roots) != 1:
        raise BacklineError(f"{path} is a zip archive, but no PyTorch checkpoint.")
    root = roots[0]
    if f"{root}constants.pkl" in names:
        raise BacklineError(f"{path} is a TorchScript program, not a checkpoint.")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise BacklineError(f"{path} was written on a big-endian machine, which is not supported.")
    with archive.open(f"{root}data.pkl") as pickled:
        unpickler = _Unpickler(pickled)
        values = _unpickle(path, unpickler)

    def load(storage: Storage) -> bytearray:
        name = f"{root}data/{storage.key}"
        size = storage.size * storage.dtype.itemsize
        if name not in names or archive.getinfo(name).file_size != size:
            raise BacklineError(f"{path} is damaged: the data of a tensor is not there in full.")
        data = bytearray(size)
        done = 0
        with archive.open(name) as member:
            while count := member.readinto(memoryview(data)[done:]):  # type: ignore[attr-defined]
                done += count
        return data

    return _checkpoint(path, values, unpickler, load)


def _parse_legacy(path: Path, file: IO[bytes]) -> Checkpoint:
    """Before torch 1.6: pickles of magic, version, machine, the object, storage keys; then the storages."""
    for _ in range(3):
        _unpickle(path, _Unpickler(file))
    unpickler = _Unpickler(file)
    values = _unpickle(path, unpickler)
    start, end = file.tell(), file.seek(0, os.SEEK_END)
    file.seek(start)
    places: dict[str, int] = {}
    for key in _unpickle(path, _Unpickler(file)):
        storage = unpickler.storages.get(str(key))
        count = file.read(8)
        if storage is None or len(count) < 8 or struct.unpack("<q", count)[0] != storage.size:
            raise BacklineError(f"{path} is truncated or damaged: download it again.")
        places[str(key)] = file.tell()
        # the last of them may be one that nobody asks for
        if file.seek(storage.size * storage.dtype.itemsize, os.SEEK_CUR) > end:
            raise BacklineError(f"{path} is truncated or damaged: download it again.")

    def load(storage: Storage) -> bytearray:
        file.seek(places[storage.key])
        return bytearray(file.read(storage.size * storage.dtype.itemsize))

    return _checkpoint(path, values, unpickler, load)


def _checkpoint(
    path: Path, values: Any, unpickler: _Unpickler, load: Callable[[Storage], bytearray]
) -> Checkpoint:
    if not isinstance(values, Mapping):
        raise BacklineError(f"{path} holds no dictionary of tensors.")
    return Checkpoint(path, dict(values), sorted(unpickler.foreign), load)


def _unpickle(path: Path, unpickler: _Unpickler) -> Any:
    try:
        return unpickler.load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise BacklineError(
            f"{path} is truncated or damaged: its list of contents cannot be read."
        ) from error


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors and plain values; anything else that a pickle names becomes a placeholder."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.foreign: set[str] = set()
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return name
        self.foreign.add(f"{module}.{name}")
        return type("Foreign", (Placeholder,), {"origin": f"{module}.{name}"})

    def persistent_load(self, reference: Any) -> Storage | Placeholder:
        kind, dtype, key, _, size = reference[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            self.foreign.add(f"storage of type {getattr(dtype, 'origin', dtype)}")
            return Placeholder()
        storage = Storage(str(key), dtype, int(size))
        self.storages[storage.key] = storage
        return storage


def _rebuild_tensor(
    storage: Any, offset: int, shape: Any, stride: Any, *_: object
) -> LazyTensor | Placeholder:
    if not isinstance(storage, Storage):
        return storage if isinstance(storage, Placeholder) else Placeholder()
    return LazyTensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _rebuild_parameter(tensor: Any, *_: object) -> Any:
    return tensor


def _mapping(*_: object) -> Plain:
    """OrderedDict and its kin, empty: a pickle sets the items afterwards."""
    return Plain()


# Everything that a checkpoint may call, by the name it has there.
PLAIN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): Plain,
    ("collections", "defaultdict"): _mapping,
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, complex)
    },
}

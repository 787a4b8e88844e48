"""Measurements of the Hopper kernels on this kind of GPU, and what they allow for a call.

``xattn bench gpu --keep`` writes a record into the user's cache: errors against float64, and seconds beside the other
implementations. ``auto`` takes the kernels only where such a record proves them. A record holds figures and no verdict;
this module judges them each time. A record is valid for one device kind, jax, jaxlib and source of the kernels. This
module imports no jax.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xattn.backend.hopper.sizes import Tiles
from xattn.system.cache import cache_folder

COMMAND = "xattn bench gpu --keep"
RESULTS = ("out", "dq", "dk", "dv")
ALLOWED = 1.2
"""The largest error allowed, relative to what the dtype alone would cost."""
LENGTHS = (128, 1000, 1024, 4096)
"""Lengths at which the kernels must be accurate before ``auto`` takes them; one is not a multiple of a block."""
Passes = Literal["forward", "forward+backward"]
PASSES: tuple[Passes, ...] = ("forward", "forward+backward")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _OfKernel(_Strict):
    activation: str
    dtype: str
    width: int
    """Head width: DHQK = DHV."""
    length: int
    tiles: Tiles


class Accuracy(_OfKernel):
    """Relative errors ‖x − x₆₄‖ / ‖x₆₄‖ of out, dq, dk and dv, and the floors that the dtype alone would cost."""

    kind: Literal["accuracy"] = "accuracy"
    errors: dict[str, float]
    floors: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest ratio of an error to its floor; infinite if a figure is missing or not a number."""
        ratios = [self.errors.get(name, math.inf) / (self.floors.get(name) or math.nan) for name in RESULTS]
        return max(ratios) if all(map(math.isfinite, ratios)) else math.inf

    @property
    def holds(self) -> bool:
        return 0 <= self.worst <= ALLOWED and min(*self.errors.values(), *self.floors.values()) >= 0


class Times(_OfKernel):
    """Median seconds of one call of the kernels, including RoPE, and of other implementations."""

    kind: Literal["times"] = "times"
    passes: Passes
    seconds: float
    others: dict[str, float]
    """Implementation → seconds."""


class TileTimes(_OfKernel):
    """Median seconds with tiles other than the default ones, forward and backward, and with the default ones."""

    kind: Literal["tile_times"] = "tile_times"
    seconds: float
    default_seconds: float


Evidence = Annotated[Accuracy | Times | TileTimes, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a record is valid for."""

    device_kind: str
    jax: str
    jaxlib: str
    source_sha256: str

    @property
    def name(self) -> str:
        """Name of the record and of its file."""
        kind = re.sub("[^a-z0-9]+", "-", self.device_kind.lower()).strip("-")
        return f"hopper-{kind}-jax-{self.jax}-jaxlib-{self.jaxlib}-{self.source_sha256[:12]}"


class Record(_Strict):
    """The content of a record's file, without its digest."""

    schema_version: Literal[1] = 1
    device_kind: str
    jax: str
    jaxlib: str
    source_sha256: str
    made_at: str
    evidence: Annotated[tuple[Evidence, ...], Field(strict=False)]


@dataclass(frozen=True)
class Proof:
    """Why ``auto`` may take the kernels for a call."""

    record: str
    """The name of the record that shows it."""
    tiles: Tiles
    """The fastest tiles that were measured."""


def identity(device_kind: str) -> Identity:
    """Return the identity of records that are valid for that kind of device with the versions installed here."""
    return Identity(
        device_kind=device_kind, jax=version("jax"), jaxlib=version("jaxlib"), source_sha256=source_sha256()
    )


@functools.cache
def source_sha256() -> str:
    """Return the SHA-256 over the names and bytes of the kernels' modules."""
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent / "hopper").glob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def write(record: Record, of: Identity) -> Path:
    """Write the record in place of any older one of that identity; only its owner can read or write the file."""
    content = record.model_dump(mode="json")
    path = cache_folder("kernels") / f"{of.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    with open(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
        json.dump({"sha256": _digest(content), "record": content}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    read.cache_clear()
    return path


@functools.cache  # a process sees one state of it: what is compiled is what was chosen
def read(of: Identity) -> Record | str:
    """Return the record of that identity, or in words why there is none that counts."""
    path = cache_folder("kernels") / f"{of.name}.json"
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
                return f"users other than its owner can write to {path}"
            loaded: Any = json.load(file)
        content, digest = loaded["record"], loaded["sha256"]
        if digest != _digest(content):
            return f"{path} was changed after it was written"
        record = Record.model_validate_json(json.dumps(content))
    except FileNotFoundError:
        return "no record"
    except (OSError, ValueError, TypeError, KeyError, RecursionError, ValidationError) as error:
        return f"{path} is damaged: {type(error).__name__}"
    stated = Identity(
        device_kind=record.device_kind, jax=record.jax, jaxlib=record.jaxlib, source_sha256=record.source_sha256
    )
    return record if stated == of else f"{path} is for another device or version"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def proof(
    of: Identity, *, activation: str, dtype: str, width: int, length: int, rival: Callable[[int], str]
) -> Proof | str:
    """Return why ``auto`` may take the kernels at that length, or in words why it may not.

    They have to be accurate at every length where that was measured, all of :data:`LENGTHS` and a longer or equal one
    among them; and quicker than their rival, in both passes, at that length or at the nearest measured ones below and
    above it. rival: length → the implementation that ``auto`` would take instead.
    """
    record = read(of)
    if isinstance(record, str):
        return f"not proven on {of.device_kind} with jax {of.jax} ({record}): `{COMMAND}` measures it there"
    key = (activation, dtype, width)
    evidence = [each for each in record.evidence if (each.activation, each.dtype, each.width) == key]
    by_length = _accurate_lengths(evidence, Tiles())
    if isinstance(by_length, str):
        return f"{by_length} ({of.name})"
    if not {*LENGTHS} <= by_length or max(by_length) < length:
        return f"its accuracy at S = {length} was not measured in {of.name}: `{COMMAND}` makes a complete record"
    times = {(each.length, each.passes): each for each in evidence if isinstance(each, Times)}
    measured = sorted({at for at, _ in times})
    below, above = [at for at in measured if at <= length], [at for at in measured if at >= length]
    near = {max(below, default=0), min(above, default=0)}
    if 0 in near or any((at, passes) not in times for at in near for passes in PASSES):
        return f"its time at S = {length} was not measured in {of.name}: `{COMMAND}` makes a complete record"
    for at in sorted(near):
        for passes in PASSES:
            seconds, other = times[at, passes].seconds, times[at, passes].others.get(rival(at), 0.0)
            if times[at, passes].tiles != Tiles() or not 0 < seconds < other:
                return f"no faster than {rival(at)} at S = {at}, {passes} ({of.name})"
    return Proof(of.name, _quickest(evidence, length))


def _accurate_lengths(evidence: Iterable[Evidence], tiles: Tiles) -> set[int] | str:
    """Return the lengths at which those tiles were accurate, or in words where they were not."""
    found = [each for each in evidence if isinstance(each, Accuracy) and each.tiles == tiles]
    for each in found:
        if not each.holds:
            return f"inaccurate at S = {each.length}: {each.worst:.2f} times its dtype's error; allowed: {ALLOWED}"
    return {each.length for each in found}


def _quickest(evidence: Iterable[Evidence], length: int) -> Tiles:
    """Return the tiles that were quickest beside the default ones, of those that are as accurate up to that length."""
    evidence = list(evidence)
    best, gain = Tiles(), 1.0
    for each in evidence:
        if isinstance(each, TileTimes) and 0 < each.seconds < gain * each.default_seconds:
            lengths = _accurate_lengths(evidence, each.tiles)
            if not isinstance(lengths, str) and {*LENGTHS} <= lengths and max(lengths) >= length:
                best, gain = each.tiles, each.seconds / each.default_seconds
    return best

"""One run over several processes, on one host or many: their places, how they meet, and how they stay together.

Each process is started by the same command and runs the same program. The first writes the run's folder and the screen;
the others do the same work in a scratch folder that is thrown away. What only one of them can see (the folder, a
signal, a mistake) is shared before any of them acts on it. Importing this module imports no jax, and does not make a
run of one process import it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xattn.errors import BadInput, ExitCode, XattnError, first_line
from xattn.system.device import compute_with, first_look, looking_for_devices
from xattn.system.screen import say

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_MANAGERS = (("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))
# The steps until every process knows of a signal; Python runs ahead meanwhile.
_STEPS_TO_AGREE = 2


@dataclass(frozen=True)
class Place:
    """The index of this process, and the number of processes."""

    index: int
    count: int
    coordinator: str | None
    """host:port of the first process; None leaves jax to find it"""
    set_by: str = field(default="", compare=False)
    """the variable that gives the count"""

    @property
    def if_alone(self) -> str:
        """Return what to do if the variable is left over, as in a shell opened by a SLURM job."""
        return f"if this is the only process, {self.set_by} is left over from another job: unset it"


def place(environment: Mapping[str, str]) -> Place:
    """Return the place by the environment: our three variables, else SLURM's, else Open MPI's; else a lone process.

    In a Kubernetes indexed job JOB_COMPLETION_INDEX replaces JAX_PROCESS_ID. SLURM and Open MPI count only if they
    started more than one task. Raises :class:`BadInput` if the variables do not fit together.
    """
    coordinator = environment.get(COORDINATOR)
    if COUNT in environment:
        count = _number(environment, COUNT)
        index = _number(environment, INDEX if INDEX in environment else "JOB_COMPLETION_INDEX")
        if not 0 <= index < count:
            raise BadInput(f"{INDEX} = {index}: must be from 0 to {COUNT} − 1 = {count - 1}")
        if count > 1 and (coordinator is None or not coordinator.rpartition(":")[2].isdigit()):
            raise BadInput(f"{COORDINATOR} = {coordinator!r}: must be host:port of process 0")
        return Place(index, count, coordinator, COUNT)
    for count_of, index_of in _MANAGERS:
        if count_of in environment and (count := _number(environment, count_of)) > 1:
            rank = environment.get(index_of, "")
            here = Place(int(rank) if rank.isdigit() else -1, count, coordinator, count_of)
            if not 0 <= here.index < count:
                must_be = f"must be from 0 to {count_of} − 1 = {count - 1}"
                raise BadInput(f"{index_of} = {environment.get(index_of)!r}: {must_be}; {here.if_alone}")
            return here
    return Place(0, 1, None)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name)
    if value is None or not value.isdigit():
        raise BadInput(f"{name} = {value!r}: must be a number in the environment of each process of several")
    return int(value)


class ToldByFirst(XattnError):
    """An error of some process, in one that need not report it: the first does."""

    def __init__(self, code: int):
        super().__init__()
        self.exit_code = ExitCode(code)


class Team:
    """The processes of a run, as one of them sees them. A single process agrees with itself, at no cost.

    All processes must reach every exchange that a method makes. If one may fail before it, :meth:`in_step` wraps that
    part and contains no other exchange. ends_together: whether all are known to leave, for the same reason.
    """

    def __init__(self, index: int = 0, count: int = 1, patience: float = 0.0):
        self.index, self.count = index, count
        self.is_first = index == 0
        self._patience = patience
        self.ends_together = False

    def all_say(self, value: Any) -> list[Any]:
        """Return the JSON values of all processes, in their order."""
        if self.count == 1:
            return [value]
        import numpy as np
        from jax.experimental.multihost_utils import process_allgather

        said = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = np.asarray(process_allgather(np.int32(len(said))))
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: len(said)] = said
        rows = np.asarray(process_allgather(padded))
        return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]

    def from_first(self, value: Any) -> Any:
        """Return the first process's JSON value, in every process."""
        return self.all_say(value if self.is_first else None)[0]

    def the_same(self, values: Mapping[str, Any]) -> None:
        """Raise :class:`BadInput` with the values that differ, if the processes do not all have the same."""
        first, *others = self.all_say(dict(values))
        for index, there in enumerate(others, start=1):
            if keys := [key for key in first if there.get(key) != first[key]]:
                self.ends_together = True
                if not self.is_first:
                    raise ToldByFirst(ExitCode.BAD_INPUT)
                lines = [f"  {key}: {first[key]!r} in process 0, {there.get(key)!r} in process {index}" for key in keys]
                more = [f"  and {len(lines) - 3} more"] if len(lines) > 3 else []
                raise BadInput("\n".join(["the processes of this run differ in:", *lines[:3], *more]))

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Wrap a part: an error in one process ends all of them, with one message and one exit code."""
        if self.count == 1:
            yield
            return
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        code = mine.exit_code if isinstance(mine, XattnError) else ExitCode.ERROR
        replies = self.all_say(None if mine is None else [int(code), str(mine) or type(mine).__name__])
        wrong = {index: said for index, said in enumerate(replies) if said is not None}
        if not wrong:
            return
        self.ends_together = True
        if self.is_first and mine is None:
            index, (code, text) = next(iter(wrong.items()))
            theirs = XattnError(f"process {index} of {self.count}: {text}")
            theirs.exit_code = ExitCode(code)
            raise theirs
        if self.is_first or not isinstance(mine, XattnError | None):
            assert mine is not None
            raise mine
        raise ToldByFirst(next(iter(wrong.values()))[0])

    def agreed(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        """Return a function that says whether ``asked`` was true in any process, alike in all of them at the same step.

        It is called at each step. The answer lags by a few steps so that no process blocks; requests in between are
        merged.
        """
        if self.count == 1:
            return asked
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

        mesh = Mesh(np.array(jax.devices()), ("devices",))
        split = NamedSharding(mesh, P("devices"))
        count = jax.jit(lambda flags: flags.sum(), out_shardings=NamedSharding(mesh, P()))
        answers: deque[Any] = deque()

        def ask() -> bool:
            mine = np.full(len(jax.local_devices()), asked(), np.int32)
            answers.append(count(jax.make_array_from_process_local_data(split, mine)))
            if len(answers) <= _STEPS_TO_AGREE or not answers.popleft():
                return False
            answers.clear()
            return True

        return ask

    def outlive(self, error: Exception) -> None:
        """Wait after an error of the devices: if a lost peer caused it, jax ends this process meanwhile (134)."""
        if self.count > 1 and ("Gloo" in str(error) or type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")):
            time.sleep(self._patience)

    @contextlib.contextmanager
    def folder(self, path: Path) -> Iterator[Path]:
        """Yield the run's folder in the first process; in the others a scratch folder, deleted at the end."""
        if self.is_first:
            yield path
            return
        scratch = Path(tempfile.mkdtemp(prefix=f"xattn-process{self.index}-"))
        try:
            yield scratch / path.name
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


_team = Team()


def team() -> Team:
    """Return the processes that this one belongs to: itself alone until :func:`join`."""
    return _team


def join(*, heartbeat_seconds: int, connect_seconds: int, threads: int | None = None) -> Team:
    """Meet the other processes, if the environment announces any; a second call returns at once.

    threads: as in :func:`xattn.system.device.compute_with`.

    Raises :class:`BadInput` if the coordinator's port is in use or jax has no device, :class:`XattnError` if the others
    do not come.
    """
    global _team
    here = place(os.environ)
    if here.count == 1 or _team.count > 1:
        return _team
    if here.index == 0 and here.coordinator is not None:
        _refuse_port_in_use(here.coordinator)
    with looking_for_devices():
        import jax

    if here.index == 0 and here.set_by != COUNT:
        say(
            f"waiting up to {connect_seconds} s for {here.count - 1} other processes ({here.set_by} = {here.count}); "
            f"{here.if_alone}",
            file=sys.stderr,
        )
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM instead of us
    try:
        jax.distributed.initialize(
            here.coordinator,
            here.count,
            here.index,
            cluster_detection_method=None if here.coordinator is None else "deactivate",
            initialization_timeout=connect_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=connect_seconds,
        )
    except Exception as error:
        raise _not_met(here, connect_seconds, error) from error
    _team = Team(here.index, here.count, patience=heartbeat_seconds + 10)
    compute_with(threads)
    first_look()  # in each process, since they agree through the devices
    return _team


def _not_met(here: Place, connect_seconds: int, error: Exception) -> XattnError:
    if here.coordinator is None and isinstance(error, ValueError):  # some of the manager's variables are missing
        return BadInput(
            f"{here.set_by} = {here.count}: this is one of {here.count} processes, and jax finds no address for the "
            f"first in the environment; set {COORDINATOR}=host:port in all of them\n{here.if_alone}"
        )
    where = here.coordinator or f"the address that jax takes from the environment of {here.set_by}"
    hint = "" if here.set_by == COUNT else f"\n{here.if_alone}"
    return XattnError(
        f"process {here.index} of {here.count} could not reach the others at {where} within {connect_seconds} s "
        f"(parallel.connect_seconds): {first_line(error)}{hint}"
    )


def _refuse_port_in_use(coordinator: str) -> None:
    port = int(coordinator.rpartition(":")[2])
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET  # the kernel may have IPv6 off
    with socket.socket(family) as probe:
        try:
            probe.bind(("", port))
        except OSError as error:
            raise BadInput(f"{COORDINATOR} = {coordinator}: this port cannot be used: {error.strerror}") from error


def leave(code: int) -> None:
    """End a process that leaves with that code. If all leave, they wait for each other. One that fails alone exits
    immediately, since the others are in the middle of a step; they notice (134)."""
    global _team
    if _team.count == 1:
        return
    if not _team.ends_together:
        os._exit(code)
    import jax

    jax.distributed.shutdown()
    _team = Team()

"""The place of a process among several, and whether it can be found."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from xattn.errors import BadInput
from xattn.system import hosts
from xattn.system.hosts import Place, place

OURS = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "there:99"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place(0, 1, None)),
        (OURS, Place(1, 2, "there:99")),
        (OURS | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "7"}, Place(1, 2, "there:99")),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "7"}, Place(7, 8, None)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place(0, 1, None)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, Place(3, 4, None)),
    ],
)
def test_the_environment_says_which_of_how_many(environment: dict[str, str], expected: Place) -> None:
    assert place(environment) == expected


@pytest.mark.parametrize("wrong", [{"JAX_PROCESS_ID": "2"}, {"JAX_PROCESS_ID": "x"}, {"JAX_COORDINATOR_ADDRESS": "a"}])
def test_variables_that_do_not_fit_together_are_bad_input(wrong: dict[str, str]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        place(OURS | wrong)


SLURM = {"SLURM_STEP_NUM_TASKS": "8"}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        (SLURM, "SLURM_PROCID"),
        (SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID"),
        (SLURM | {"SLURM_PROCID": "8"}, "SLURM_PROCID"),  # of another step
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK"),
    ],
)
def test_variables_that_are_left_over_are_named_and_what_to_do(environment: dict[str, str], name: str) -> None:
    with pytest.raises(BadInput, match=f"{name} = .*{next(iter(environment))} is left over .*: unset it"):
        place(environment)


@pytest.mark.parametrize(
    "environment",
    [SLURM | {"SLURM_PROCID": "1"}, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}],
)
def test_processes_that_jax_finds_no_address_for_are_told_so(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was "at None". jax asks for more of the manager's variables than say how many processes there are."""
    # It looks for the address only in a process that has not used its devices, and other tests of this one have.
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    count = next(iter(environment))
    with pytest.raises(BadInput) as told:
        hosts.join(heartbeat_seconds=10, connect_seconds=3)
    assert "None" not in str(told.value)
    assert f"{count} = {environment[count]}" in str(told.value)
    assert "set JAX_COORDINATOR_ADDRESS=host:port" in str(told.value)
    assert f"{count} is left over" in str(told.value)


@pytest.mark.parametrize("has_ipv6", [True, False])
def test_a_port_in_use_is_noticed_also_where_the_kernel_has_no_ipv6(
    has_ipv6: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Socket(socket.socket):
        def __init__(self, family: int = socket.AF_INET, *kind: int):
            if family == socket.AF_INET6 and not has_ipv6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *kind)

    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        coordinator = f"localhost:{other.getsockname()[1]}"
        monkeypatch.setattr(hosts.socket, "socket", Socket)
        with pytest.raises(BadInput, match="this port cannot be used"):
            hosts._refuse_port_in_use(coordinator)
    hosts._refuse_port_in_use(coordinator)

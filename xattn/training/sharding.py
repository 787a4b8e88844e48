"""One run over many devices: a mesh with four named axes, and one table that says which axis splits what.

The compiled step is given the placement of its state and batch on the mesh. An interceptor constrains the activations
of each layer from outside the model, and XLA's partitioner does the rest (GSPMD, Xu et al., arXiv 2105.04663). The
model's own code needs only the number of devices that split the sequence (:func:`xattn.backend.mesh.context_devices`).
With one device none of this is used, and the programs are the same as without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from xattn.backend import xla_cpu
from xattn.config import Config
from xattn.errors import BadInput
from xattn.model.transformer import Layer
from xattn.training.config import ParallelConfig

# Model axis → the mesh axes that split it. An embedding is split along its vocabulary alone. If its width were split
# over devices that have different tokens, each lookup would send the whole table around.
MESH_AXES = {"embed": ("fsdp",), "heads": ("tensor",), "hidden": ("tensor",), "vocabulary": ("tensor", "fsdp")}

# (module name, parameter name) → the parameter's last axes. A parameter that is not listed is not split.
PARAMETERS: dict[tuple[str, str], tuple[str | None, ...]] = {
    ("token_embedding", "embedding"): ("vocabulary", None),
    ("output_embedding", "embedding"): ("vocabulary", None),
    ("query", "kernel"): ("embed", "heads"),
    ("key", "kernel"): ("embed", "heads"),
    ("value", "kernel"): ("embed", "heads"),
    ("output", "kernel"): ("heads", "embed"),
    ("gate", "kernel"): ("embed", "hidden"),
    ("up", "kernel"): ("embed", "hidden"),
    ("down", "kernel"): ("hidden", "embed"),
    ("attention", "sigmoid_bias"): ("heads",),
    ("attention", "sink"): ("heads",),
    ("attention", "decay_bias"): ("heads",),
    ("decay", "kernel"): ("embed", "heads"),
    ("decay", "bias"): ("heads",),
    ("input_gate", "kernel"): ("embed", "heads"),
    ("input_gate", "bias"): ("heads",),
    ("attention", "query_taps"): (None, "heads"),
    ("attention", "key_taps"): (None, "heads"),
    ("attention", "value_taps"): (None, "heads"),
    ("output_gate", "kernel"): ("embed", "heads"),
}
_ROWS = ("data", "fsdp")  # the mesh axes that split the rows of a batch


class Layout:
    """The placement of a run's arrays on its devices. With one device it leaves everything as it is."""

    def __init__(self, sizes: dict[str, int]):
        self.sizes = sizes
        self.mesh: jax.sharding.Mesh | None = None
        if math.prod(sizes.values()) > 1:
            axes = (AxisType.Auto,) * len(sizes)
            self.mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axes)

    def __str__(self) -> str:
        return " × ".join(f"{axis} {size}" for axis, size in self.sizes.items() if size > 1) or "one device"

    # ---- the placement of arrays

    def state(self, shapes: Any) -> Any:
        """Return a sharding for each leaf of a train state. Parameters follow the table, and so do their statistics in
        the optimizer's state. Everything else is whole on each device."""
        return jax.tree_util.tree_map_with_path(self._of_parameter, shapes)

    def rows(self) -> NamedSharding:
        """Return the sharding of a batch's leaves: the first axis is split over data and fsdp. The sequence is split
        inside the program, because tokens are one longer than it."""
        return self._sharding(P(_ROWS))

    def whole(self) -> NamedSharding:
        """Return the sharding of arrays that are the same on each device."""
        return self._sharding(P())

    def rows_here(self, batch_size: int) -> slice:
        """Return the range of a batch's rows that this process's devices work on."""
        if self.mesh is None:
            return slice(0, batch_size)
        parts = self.rows().addressable_devices_indices_map((batch_size,)).values()
        bounds = [part[0].indices(batch_size) for part in parts if part is not None]
        return slice(min(first for first, _, _ in bounds), max(last for _, last, _ in bounds))

    def _sharding(self, spec: P) -> NamedSharding:
        assert self.mesh is not None, "one device has no mesh"
        return NamedSharding(self.mesh, spec)

    def _of_parameter(self, path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        axes = PARAMETERS.get(tuple(names[-2:]), ()) if len(names) > 1 else ()
        if len(axes) > leaf.ndim:  # one of the optimizer's placeholders
            return self.whole()
        first = leaf.ndim - len(axes)  # layers are stacked in front
        split = [self._splits(axis, leaf.shape[first + i]) for i, axis in enumerate(axes)]
        return self._sharding(P(*[None] * first, *split))

    def _splits(self, axis: str | None, size: int) -> tuple[str, ...]:
        """Return the mesh axes that split a model axis, as far as they divide it: a vocabulary of 257 stays whole."""
        axes: tuple[str, ...] = ()
        for mesh_axis in MESH_AXES[axis] if axis else ():
            if size % math.prod(self.sizes[name] for name in (*axes, mesh_axis)) == 0:
                axes += (mesh_axis,)
        return axes

    # ---- wrappers around the programs

    def init(self, init: Any, shapes: Any) -> Any:
        """Return a function from hyperparameters to the state; each leaf is created where it belongs."""
        if self.mesh is None:
            return jax.jit(init)
        program = jax.jit(init, out_shardings=self.state(shapes))
        return lambda hyperparameters: program(jax.device_get(hyperparameters))

    def jit_step(self, step: Any, shapes: Any) -> Any:
        """Jit the step. It consumes the state it is given, except on a CPU."""
        donated = xla_cpu.donated(0)
        if self.mesh is None:
            return jax.jit(step, donate_argnums=donated)
        state = self.state(shapes)
        given, made = (state, self.rows()), (state, self.whole())
        return jax.jit(step, donate_argnums=donated, in_shardings=given, out_shardings=made)

    def step(self, compiled: Any, batch_size: int) -> Any:
        """Return the compiled step for batches on the host, which hold :meth:`rows_here` or all rows."""
        if self.mesh is None:
            return compiled
        return lambda state, batch: compiled(state, _place(batch, self.rows(), batch_size, self.rows_here(batch_size)))

    def results(self) -> NamedSharding | None:
        """Return the sharding of results that every host reads; None on one device."""
        return None if self.mesh is None else self.whole()

    def score(self, score: Any) -> Any:
        """Wrap a program of (params, hyperparameters, batch on the host). Its one result is the same on each device."""
        if self.mesh is None:
            return score

        def placed(params: Any, hyperparameters: Any, batch: Any) -> Any:
            with self.tracing():
                return score(params, hyperparameters, _place(batch, self.rows()))

        return placed

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Split activations between layers by rows and sequence in programs traced within this context."""
        if self.mesh is None:
            yield
            return
        # By rank: the residual stream (B, S, D), the first layer's values (B, NKV, S, DH), and a flag without axes.
        of_axes = {3: P(_ROWS, "context", None), 4: P(_ROWS, P.UNCONSTRAINED, "context", None), 0: P()}

        def constrain(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            out = call(*args, **kwargs)
            if context.method_name != "__call__" or not isinstance(context.module, Layer | nn.Embed):
                return out
            return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self._sharding(of_axes[x.ndim])), out)

        with jax.set_mesh(self.mesh), nn.intercept_methods(constrain):
            yield


def layout_of(config: Config) -> Layout:
    """Return the layout that the config asks for, on this run's devices. Raises :class:`BadInput` if the mesh does not
    fit the devices or the model."""
    sizes = mesh_sizes(config.parallel, jax.device_count(), jax.process_count())
    check_mesh(config, sizes)
    return _layout(tuple(sizes.items()))


def check_mesh(config: Config, sizes: dict[str, int]) -> None:
    """Raise :class:`BadInput` if the mesh does not divide the batch or the model."""
    rows, model = sizes["data"] * sizes["fsdp"], config.model
    parts = config.trainer.gradient_accumulation
    batch = "trainer.batch_size" if parts == 1 else "trainer.batch_size / trainer.gradient_accumulation"
    divided = {
        batch: (config.trainer.batch_size // parts, "data × fsdp", rows),
        "backend.context_length": (config.backend.context_length, "context", sizes["context"]),
        "model.embedding_dim": (model.embedding_dim, "fsdp", sizes["fsdp"]),
        "model.num_heads": (model.num_heads, "tensor", sizes["tensor"]),
        "model.mlp_dim": (model.mlp_dim, "tensor", sizes["tensor"]),
    }
    for key, (value, axis, size) in divided.items():
        if value % size:
            raise BadInput(f"parallel: {key} = {value} is not a multiple of {axis} = {size}")


@lru_cache(maxsize=8)
def _layout(sizes: tuple[tuple[str, int], ...]) -> Layout:
    return Layout(dict(sizes))


def mesh_sizes(config: ParallelConfig, devices: int, processes: int = 1) -> dict[str, int]:
    """Return the size of each axis. An axis that is None takes the devices that the others leave.

    A mesh of one device in a single process may leave devices unused. A mesh of several must be exactly the devices of
    all processes. Raises :class:`BadInput`.
    """
    axes = config.axes()
    known = math.prod(size for size in axes.values() if size is not None)
    free = [axis for axis, size in axes.items() if size is None]
    sizes = {axis: devices // known if size is None else size for axis, size in axes.items()}
    product = math.prod(sizes.values())
    if product == devices or (product == 1 and processes == 1 and not free):
        return sizes
    asked = ", ".join(f"parallel.{axis} = {size}" for axis, size in axes.items() if size is not None and size > 1)
    if free:
        raise BadInput(
            f"{asked}: {known} does not divide the {devices} devices that parallel.{free[0]} = null distributes"
        )
    there = "is 1 device" if devices == 1 else f"are {devices} devices"
    there += f" in {processes} processes" if processes > 1 else ""
    raise BadInput(
        f"{asked or 'parallel=single'}: a mesh of {product} device{'s' * (product > 1)}, but there {there}; "
        "parallel=data, fsdp, context or tensor uses all of them"
    )


def like(host: Any, state: Any) -> Any:
    """Place host arrays on the devices as the leaves of ``state`` are placed."""
    return jax.tree.map(lambda leaf, there: _place(leaf, there.sharding), host, state)


def _place(tree: Any, sharding: Any, size: int | None = None, here: slice = slice(None)) -> Any:
    """Place host arrays on the mesh. Arrays shorter than ``size`` hold only the rows ``here``."""
    if not isinstance(sharding, NamedSharding):
        return jax.device_put(tree)

    def place(leaf: Any) -> jax.Array:
        array = np.asarray(leaf)
        if size is None or len(array) == size:
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        def rows(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(size)
            return array[(slice(first - here.start, last - here.start), *index[1:])]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, rows)

    return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
    """Return each leaf as a whole NumPy array in every process. All processes must call this."""

    def gathered(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(gathered, tree))


def from_first(host: Any, shapes: Any) -> Any:
    """Return the first process's host arrays in every process; the others pass None. Raw bytes are sent, to keep −0."""
    if jax.process_count() == 1:
        return host
    if host is None:
        host = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def sent(leaf: Any) -> np.ndarray:
        flat = np.ascontiguousarray(leaf).reshape(-1)
        received = np.asarray(broadcast_one_to_all(flat.view(np.uint8)))
        return received.view(flat.dtype).reshape(np.shape(leaf))

    return jax.tree.map(sent, host)


def on_one_device(tree: Any) -> Any:
    """Place each leaf whole on this process's first device, for programs that do not use the mesh."""
    if all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.device_put(to_host(tree), jax.local_devices()[0])

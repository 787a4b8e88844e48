"""An attempt at a pack: runs that differ in numbers alone and train as one program, most often a single one.

Each run keeps its own folder, rows, checkpoints and end (:class:`xattn.attempt.Attempt`); the corpus, the programs and
the pace are shared. A pack that is resumed has the same members in the same places; those that have ended since keep
theirs, where nothing changes any more: so the program is the same, and so are the bits.

Importing this module imports no jax.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from xattn import hosts
from xattn.attempt import Attempt
from xattn.config import Config
from xattn.data.config import has_segments
from xattn.device import ask_for_determinism, compute_with, first_look, hush_libraries, keep_compiled_programs
from xattn.errors import BadInput, ExitCode, XattnError, storage_error
from xattn.model.config import group_of

if TYPE_CHECKING:
    from xattn.backend.dispatch import Choice
    from xattn.hardware import Hardware
    from xattn.training.checkpoint import Restored
    from xattn.training.loop import Member
    from xattn.training.programs import Programs, TrainState


class Pack:
    """Attempts at runs of one program, data and pace, one of them at least not finished.

    names: of the runs' folders. stop: asked at each step; True saves and leaves.
    """

    def __init__(self, attempts: Sequence[Attempt], names: Sequence[str], stop: Callable[[], bool]):
        self._attempts, self._names, self._stop = attempts, names, stop
        self._open = [attempt for attempt in attempts if not attempt.is_finished]
        self._config: Config = self._open[0].config

    def carry_out(self) -> list[ExitCode]:
        """Each run's exit code. What a person can mend is raised as :class:`XattnError`."""
        try:
            with hosts.team().in_step():
                for attempt in self._open:
                    attempt.look()
            self._train()
        except XattnError as error:
            for attempt in self._without_result():
                attempt.refused(error)
            raise
        except Exception as error:  # the outermost rim around a run
            hosts.team().outlive(error)
            self._note(traceback.format_exc())
            if (full := storage_error(error, self._open[0].folder.path)) is not None:
                for attempt in self._without_result():
                    attempt.code = full.exit_code
                raise full from error
            for attempt in self._without_result():
                attempt.failed(error)
        finally:
            with ThreadPoolExecutor(len(self._open)) as pool:  # each may take wandb's time
                list(pool.map(Attempt.part_from_wandb, self._open))
            for attempt in self._open:  # after wandb, which may have taken a checkpoint
                attempt.keep_what_is_asked()
        return [attempt.code for attempt in self._attempts]

    def _without_result(self) -> list[Attempt]:
        return [attempt for attempt in self._open if not attempt.is_concluded]

    def _note(self, text: str) -> None:
        for attempt in self._without_result():
            attempt.note(text)

    def _train(self) -> None:
        config = self._config
        hush_libraries(self._note)
        if config.trainer.deterministic:
            ask_for_determinism()
        compute_with(config.trainer.threads)
        first_look()  # what jax cannot have is told of before anything else imports it

        from xattn.training.loop import train
        from xattn.training.memory import refuse_what_does_not_fit
        from xattn.training.programs import programs
        from xattn.training.sharding import layout_of

        keep_compiled_programs()
        with hosts.team().in_step():
            layout = layout_of(config)
            choices = choose_attention(
                config, context=layout.sizes["context"], devices=math.prod(layout.sizes.values())
            )
            for attempt in self._attempts:
                attempt.read_data(layout, self._stop)
        data = self._open[0].data  # of the others only the batches differ
        hosts.team().the_same({"data_sha256": data.sha256})
        with hosts.team().in_step():
            for attempt in self._open:
                attempt.begin(choices, layout, self._names if len(self._names) > 1 else None)
        with contextlib.ExitStack() as resources:
            for attempt in self._open:
                resources.enter_context(attempt.working())
            compiled, compiled_now = programs(
                config, data.tokenizer.vocab_size, optional=data.optional, size=len(self._attempts)
            )
            refuse_what_does_not_fit(compiled.peak_memory_bytes, config)
            members = self._members(compiled)
            for attempt in self._open:
                first = compiled_now and attempt is self._open[0]
                attempt.describe(compiled, compile_seconds=compiled.compile_seconds if first else None)
            bytes_per_token = data.bytes_per_token()
            stop = hosts.team().agreed(self._stop)
            while any(member.active for member in members):
                training = [attempt for attempt in self._open if attempt.is_training]
                train(
                    compiled,
                    members,
                    data.windows,
                    config.trainer,
                    bytes_per_token=bytes_per_token,
                    stop=stop,
                )
                for attempt in training:
                    if not attempt.is_training and not attempt.rolls_back(compiled):
                        attempt.conclude(compiled)

    def _members(self, compiled: Programs) -> list[Member]:
        """All runs in their places, each as it was at the newest step that is whole in all."""
        from xattn.training.loop import Member, Progress
        from xattn.training.programs import ended, hyperparameters

        fresh = [compiled.init(hyperparameters(attempt.config)) for attempt in self._attempts]
        of_attempts = dict(zip(self._attempts, fresh, strict=True))
        restored = self._newest_of_all(of_attempts)
        return [
            attempt.go_on_from(restored[attempt], state)
            if attempt in restored
            else Member(Progress(ended(state)), attempt.data.batch, active=False)
            for attempt, state in of_attempts.items()
        ]

    def _newest_of_all(self, fresh: Mapping[Attempt, TrainState]) -> dict[Attempt, Restored | None]:
        """A checkpoint of each open run, all of one step; None where they begin.

        fresh: the state that each run begins with.

        Raises :class:`IntegrityError` where one has none that its rows of metrics.jsonl reach to.
        """
        at_most: int | None = None
        while True:
            restored = {attempt: attempt.restore(fresh[attempt], at_most) for attempt in self._open}
            steps = {0 if found is None else found.step for found in restored.values()}
            if 0 in steps:
                for attempt in self._open:
                    attempt.refuse_to_lose_rows()
            if len(steps) == 1:
                return restored
            at_most = min(steps)


def choose_attention(
    config: Config, *, context: int, devices: int = 1, hardware: Hardware | None = None
) -> dict[str, Choice]:
    """Kind of layer → what the dispatch table says to its attention of one training batch.

    context: devices that the sequence is split over. devices: all of the mesh. hardware: what they are; None is what is
    here. Raises :class:`BadInput`.
    """
    from xattn.backend import dispatch
    from xattn.backend.activations import activation

    model = config.model
    where: dict[str, Any] = {}
    if hardware is not None:
        where = {"platform": hardware.platform, "compute_capability": hardware.compute_capability}
    found = {}
    for kind, backend in config.backend.kinds.items():
        call = dispatch.Call(
            activation=activation(backend.activation),
            dtype=model.dtype,
            batch=config.trainer.batch_size,
            num_heads=model.num_heads,
            num_kv_heads=model.kv_heads,
            sequence=backend.context_length,
            head_dim_qk=model.head_dim,
            head_dim_v=model.head_dim,
            window=backend.window,
            has_segment_ids=has_segments(config.data),
            has_decay=backend.decay != "none",
            has_input_gate=backend.input_gate != "none",
            has_sink=backend.sink != "none",
            context=context,
            devices=devices,
            **where,
        )
        try:
            found[kind] = dispatch.choose(call, backend.implementation)
        except ValueError as error:
            raise BadInput(f"{group_of(kind)}.implementation: {error}") from error
    return found

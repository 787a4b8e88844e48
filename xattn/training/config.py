"""The user's choices about training. Importing this module imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from xattn.section import Section
from xattn.training.kept import Keep

Fraction = Annotated[float, Field(ge=0, le=1)]


class ScheduleConfig(Section):
    """The group ``schedule``: the factor on the learning rate at each step."""

    name: Literal["constant", "linear", "cosine", "wsd"]
    """What follows the warm-up: ``constant``, ``linear`` or ``cosine`` decay over the rest of the run, or ``wsd``
    (warm-up, stable, decay), which is constant and then decays linearly.
    """
    warmup_fraction: Fraction
    """Share of the steps during which the factor rises linearly to 1."""
    decay_fraction: Fraction
    """Share of the steps during which ``wsd`` decays."""
    final_fraction: Fraction
    """Factor at the end of a decay."""

    @model_validator(mode="after")
    def _fits_in_the_run(self) -> ScheduleConfig:
        if self.name == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} + decay_fraction {self.decay_fraction} is more than 1"
            )
        return self


class TrainerConfig(Section):
    """The group ``trainer``: length and pace of a run."""

    steps: PositiveInt
    """Updates to make."""
    batch_size: PositiveInt
    """Sequences of context_length tokens in each update."""
    gradient_accumulation: PositiveInt
    """Number of equal parts into which a batch is split; must divide batch_size. Their gradients are computed one after
    another, in the memory of one part. The result is the same up to rounding and dropout's draws.
    """
    log_every: PositiveInt
    """Steps between training rows in metrics.jsonl; the last step always writes one."""
    eval_every: PositiveInt
    """Steps between evaluations; the last step is always evaluated."""
    attention_stats_every: PositiveInt | None
    """Steps between measurements of each head's attention; the last step is measured too. null turns this off."""
    checkpoint_every: PositiveInt | None
    """Steps between checkpoints, besides those of the best evaluations and the last step; null turns this off."""
    checkpoint_minutes: PositiveFloat | None
    """A checkpoint is also written once the last one is this many minutes old; null turns this off."""
    keep: Keep
    """Which checkpoints of a finished run are kept: ``best_and_last``; ``last``; ``parameters``, the parameters of the
    best and the last without the optimizer's state, enough to sample, evaluate and export; or ``nothing``, which leaves
    only the losses. An unfinished run keeps what it resumes from.
    """
    nonfinite: Literal["stop", "skip", "rollback"]
    """What to do when a loss or gradient is not finite. ``stop`` ends the run as diverged, with the parameters of the
    step before. ``skip`` leaves the update out, and stops after 10 in a row. ``rollback`` returns to the last
    checkpoint or the start, leaves that batch out, and stops after 3 times.
    """
    deterministic: bool
    """Whether a GPU computes the same bits each time; some faster operations of XLA do not promise it. A CPU always
    does.
    """
    threads: PositiveInt | None
    """Number of compute threads on a CPU; null means one per core. It changes the last bits, because a matrix product
    is summed in as many parts. Other devices ignore it.
    """

    def logs(self, step: int) -> bool:
        return step == self.steps or step % self.log_every == 0

    def evaluates(self, step: int) -> bool:
        return step == self.steps or step % self.eval_every == 0

    def takes_statistics(self, step: int) -> bool:
        every = self.attention_stats_every
        return every is not None and (step == self.steps or step % every == 0)

    def leaves_row(self, step: int) -> bool:
        """Return whether metrics.jsonl gets a row at this step."""
        return self.logs(step) or self.evaluates(step) or self.takes_statistics(step)

    @model_validator(mode="after")
    def _batch_has_equal_parts(self) -> TrainerConfig:
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gradient_accumulation {self.gradient_accumulation}"
            )
        return self


class ParallelConfig(Section):
    """The group ``parallel``: the axes of the device mesh. Their product is the number of devices of all processes.

    At most one axis may be null; it takes the devices that the others leave.
    """

    data: PositiveInt | None
    """Number of copies of the model, each with its share of the batch."""
    fsdp: PositiveInt | None
    """Parts into which the batch and the parameters are split; a layer's parameters are gathered for its use."""
    context: PositiveInt | None
    """Parts into which the sequence is split."""
    tensor: PositiveInt | None
    """Parts into which heads, hidden units and the vocabulary are split."""
    heartbeat_seconds: PositiveInt
    """With several processes: a peer that is silent for this long counts as dead, and all processes exit."""
    connect_seconds: PositiveInt
    """With several processes: how long the first process to start waits for the last."""

    @model_validator(mode="after")
    def _is_determined(self) -> ParallelConfig:
        free = [name for name, size in self.axes().items() if size is None]
        if len(free) > 1:
            raise ValueError(f"{' and '.join(free)} are null; at most one axis may be")
        return self

    def axes(self) -> dict[str, int | None]:
        """Return the mesh's axes, ordered from the least to the most communication between neighbours."""
        return {"data": self.data, "fsdp": self.fsdp, "context": self.context, "tensor": self.tensor}

"""What a person chooses about training. Importing this module imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from xattn.section import Section
from xattn.training.kept import Keep

Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class _Optimizer(Section):
    """What every optimizer has.

    learning_rate: its peak; the schedule multiplies it by a factor between 0 and 1.
    weight_decay: decoupled, times the learning rate; on matrices and embeddings, never on scales and biases.
    clip_norm: the gradient is scaled down to this global norm where it exceeds it; null never clips.
    """

    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    clip_norm: PositiveFloat | None


class AdamWConfig(_Optimizer):
    """``optimizer=adamw`` (Loshchilov and Hutter, arXiv 1711.05101)."""

    name: Literal["adamw"]
    beta1: Momentum
    beta2: Momentum
    eps: PositiveFloat


class SGDConfig(_Optimizer):
    """``optimizer=sgd``: stochastic gradient descent with heavy-ball momentum."""

    name: Literal["sgd"]
    momentum: Momentum


class LionConfig(_Optimizer):
    """``optimizer=lion`` (Chen et al., arXiv 2302.06675)."""

    name: Literal["lion"]
    beta1: Momentum
    beta2: Momentum


class MuonConfig(_Optimizer):
    """``optimizer=muon``: orthogonalised momentum on the layers' matrices, AdamW on everything else.

    learning_rate belongs to the matrices, whose update has root-mean-square entry ~0.2 like AdamW's (Liu et al.,
    arXiv 2502.16982), so that one rate serves both.

    It is optax's ``scale_by_muon``, which differs from Keller Jordan's (github.com/KellerJordan/Muon, muon.py):

    - Newton–Schulz runs in the gradient's dtype, float32, and not in bfloat16; eps is 1e-8, there 1e-7. The five steps
      and their coefficients are the same.
    - Momentum and gradient are corrected for Adam's bias before Nesterov mixes them; it matters in the first updates.

    And ours differs from both in the scale: 0.2 · √max(in, out), there √max(1, out/in). A learning rate of theirs is
    not one of ours. One rate serves the rest too (theirs: 0.02 and 3e-4); weight_decay is 0.1, on embeddings too, and
    none on vectors (theirs: 0); gradients are clipped before (there not). AdamW's eps is 1e-8, there 1e-10.
    """

    name: Literal["muon"]
    momentum: Momentum
    beta1: Momentum
    beta2: Momentum
    eps: PositiveFloat


OptimizerConfig = Annotated[AdamWConfig | SGDConfig | LionConfig | MuonConfig, Field(discriminator="name")]


class ScheduleConfig(Section):
    """The group ``schedule``: the factor on the learning rate at each step.

    name: what follows the warm-up: ``constant``, ``linear`` or ``cosine`` decay over the rest of the run, or ``wsd``
        (warm-up, stable, decay): constant, then linear decay.
    warmup_fraction: share of the steps in which the factor rises linearly to 1.
    decay_fraction: share of the steps in which ``wsd`` decays.
    final_fraction: the factor at the end of a decay.
    """

    name: Literal["constant", "linear", "cosine", "wsd"]
    warmup_fraction: Fraction
    decay_fraction: Fraction
    final_fraction: Fraction

    @model_validator(mode="after")
    def _fits_in_the_run(self) -> ScheduleConfig:
        if self.name == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} + decay_fraction {self.decay_fraction} is more than 1"
            )
        return self


class TrainerConfig(Section):
    """The group ``trainer``: length and pace of a run.

    steps: updates to make.
    batch_size: sequences of context_length tokens in each.
    gradient_accumulation: parts, one after the other, in which a batch's gradient is computed: the same result up to
        rounding, and up to dropout's draws, with a part's memory; a divisor of batch_size.
    log_every, eval_every: every so many steps (and at the last) a training row is logged, the model is evaluated.
    attention_stats_every: every so many steps (and at the last) each head's attention is measured; null means never.
    checkpoint_every, checkpoint_minutes: a checkpoint is written every so many steps, and when the last one is so old,
        besides at the best evaluations and at the end; null means not for that reason.
    keep: what stays of the checkpoints of a run that is done or diverged: ``best_and_last``; ``last``; ``parameters``,
        those of the best and the last without the optimizer's state, which is all that sampling, evaluating and
        exporting need; ``nothing``, which leaves the losses. A run that is not finished keeps what it resumes from.
    nonfinite: what a loss or gradient that is not finite does: ``stop`` ends the run as diverged with the parameters
        of the step before; ``skip`` leaves that update out and goes on, and stops after 10 in a row; ``rollback``
        returns to the last checkpoint or the beginning, leaves that update's batch out, and stops after 3 times.
    deterministic: the same bits on a GPU too, where some of XLA's faster operations do not promise them. A CPU's are
        the same anyway.
    threads: on a CPU, how many threads compute; null means as many as there are cores. It changes the last bits, since
        a matrix product is summed in as many parts. Other devices ignore it.
    """

    steps: PositiveInt
    batch_size: PositiveInt
    gradient_accumulation: PositiveInt
    log_every: PositiveInt
    eval_every: PositiveInt
    attention_stats_every: PositiveInt | None
    checkpoint_every: PositiveInt | None
    checkpoint_minutes: PositiveFloat | None
    keep: Keep
    nonfinite: Literal["stop", "skip", "rollback"]
    deterministic: bool
    threads: PositiveInt | None

    def logs(self, step: int) -> bool:
        return step == self.steps or step % self.log_every == 0

    def evaluates(self, step: int) -> bool:
        return step == self.steps or step % self.eval_every == 0

    def studies(self, step: int) -> bool:
        every = self.attention_stats_every
        return every is not None and (step == self.steps or step % every == 0)

    def leaves_row(self, step: int) -> bool:
        """Whether metrics.jsonl gets a row at that step."""
        return self.logs(step) or self.evaluates(step) or self.studies(step)

    @model_validator(mode="after")
    def _batch_has_equal_parts(self) -> TrainerConfig:
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gradient_accumulation {self.gradient_accumulation}"
            )
        return self


class ParallelConfig(Section):
    """The group ``parallel``: the axes of the device mesh. Their product is the number of devices of all processes.

    data: copies of the model, each with its share of the batch.
    fsdp: the batch and the parameters are split alike; a layer's parameters are gathered where they are used.
    context: the sequence is split.
    tensor: heads, hidden units and the vocabulary are split.
        null, for one of the four at most: the devices that the others leave.
    heartbeat_seconds: of several processes: a peer that has been silent for so long is taken for dead, and all leave.
    connect_seconds: of several processes: how long the first to start wait for the last.
    """

    data: PositiveInt | None
    fsdp: PositiveInt | None
    context: PositiveInt | None
    tensor: PositiveInt | None
    heartbeat_seconds: PositiveInt
    connect_seconds: PositiveInt

    @model_validator(mode="after")
    def _is_determined(self) -> ParallelConfig:
        free = [name for name, size in self.axes().items() if size is None]
        if len(free) > 1:
            raise ValueError(f"{' and '.join(free)} are null: one axis at most takes what the others leave")
        return self

    def axes(self) -> dict[str, int | None]:
        """The mesh's axes, from the one whose neighbours talk least to the one whose neighbours talk most."""
        return {"data": self.data, "fsdp": self.fsdp, "context": self.context, "tensor": self.tensor}

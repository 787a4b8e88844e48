"""What a person chooses about training. Importing this module imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from xattn.section import Section

Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class _Optimizer(Section):
    """What every optimizer has."""

    learning_rate: PositiveFloat
    """Peak learning rate; the schedule multiplies it by a factor between 0 and 1."""
    weight_decay: NonNegativeFloat
    """Decoupled weight decay, times the learning rate; on matrices and embeddings, never on scales and biases."""
    clip_norm: PositiveFloat | None
    """A gradient of a larger global norm is scaled down to this norm; null never clips."""


class AdamWConfig(_Optimizer):
    """``optimizer=adamw`` (Loshchilov and Hutter, arXiv 1711.05101)."""

    name: Literal["adamw"]
    beta1: Momentum
    """Decay of the running mean of gradients."""
    beta2: Momentum
    """Decay of the running mean of squared gradients."""
    eps: PositiveFloat
    """Added to the root of the second moment."""


class SGDConfig(_Optimizer):
    """``optimizer=sgd``: stochastic gradient descent with heavy-ball momentum."""

    name: Literal["sgd"]
    momentum: Momentum
    """Decay of the running sum of gradients."""


class LionConfig(_Optimizer):
    """``optimizer=lion`` (Chen et al., arXiv 2302.06675)."""

    name: Literal["lion"]
    beta1: Momentum
    """Weight of the momentum in the update's sign."""
    beta2: Momentum
    """Decay of the momentum."""


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
    """Decay of the matrices' momentum, before it is orthogonalised."""
    beta1: Momentum
    """AdamW's, for all other parameters."""
    beta2: Momentum
    """AdamW's, for all other parameters."""
    eps: PositiveFloat
    """AdamW's, for all other parameters."""


OptimizerConfig = Annotated[AdamWConfig | SGDConfig | LionConfig | MuonConfig, Field(discriminator="name")]


class ScheduleConfig(Section):
    """The group ``schedule``: the factor on the learning rate at each step."""

    name: Literal["constant", "linear", "cosine", "wsd"]
    """What follows the warm-up: ``constant``, ``linear`` or ``cosine`` decay over the rest of the run, or ``wsd``
    (warm-up, stable, decay), which is constant and then decays linearly.
    """
    warmup_fraction: Fraction
    """Share of the steps in which the factor rises linearly to 1."""
    decay_fraction: Fraction
    """Share of the steps in which ``wsd`` decays."""
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
    """Number of parts, a divisor of batch_size, in which a batch's gradient is computed one after the other. It needs
    the memory of one part; the result is the same up to rounding and dropout's draws.
    """
    log_every: PositiveInt
    """Steps between training rows in metrics.jsonl; the last step always has one."""
    eval_every: PositiveInt
    """Steps between evaluations; the last step always has one."""
    attention_stats_every: PositiveInt | None
    """Steps between measurements of each head's attention, which the last step also has; null never measures."""
    checkpoint_every: PositiveInt | None
    """Steps between checkpoints, besides those of the best evaluations and the last step; null turns this off."""
    checkpoint_minutes: PositiveFloat | None
    """A checkpoint is also written when the last one is this many minutes old; null turns this off."""
    nonfinite: Literal["stop", "skip", "rollback"]
    """What happens at a loss or gradient that is not finite. ``stop`` ends the run as diverged with the parameters of
    the step before. ``skip`` leaves the update out, and stops after 10 in a row. ``rollback`` returns to the last
    checkpoint or the beginning, leaves that batch out, and stops after 3 times.
    """
    deterministic: bool
    """Whether a GPU computes the same bits each time, which some of XLA's faster operations do not promise. A CPU
    always does.
    """
    threads: PositiveInt | None
    """On a CPU, how many threads compute; null means one for each core. It changes the last bits, since a matrix
    product is summed in as many parts. Other devices ignore it.
    """

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

    One axis at most may be null: it takes the devices that the others leave.
    """

    data: PositiveInt | None
    """Copies of the model, each with its share of the batch."""
    fsdp: PositiveInt | None
    """Parts into which both the batch and the parameters are split; a layer's parameters are gathered where they are
    used.
    """
    context: PositiveInt | None
    """Parts into which the sequence is split."""
    tensor: PositiveInt | None
    """Parts into which heads, hidden units and the vocabulary are split."""
    heartbeat_seconds: PositiveInt
    """With several processes: a peer that has been silent this long is taken for dead, and all leave."""
    connect_seconds: PositiveInt
    """With several processes: how long the first to start wait for the last."""

    @model_validator(mode="after")
    def _is_determined(self) -> ParallelConfig:
        free = [name for name, size in self.axes().items() if size is None]
        if len(free) > 1:
            raise ValueError(f"{' and '.join(free)} are null: one axis at most takes what the others leave")
        return self

    def axes(self) -> dict[str, int | None]:
        """The mesh's axes, from the one whose neighbours talk least to the one whose neighbours talk most."""
        return {"data": self.data, "fsdp": self.fsdp, "context": self.context, "tensor": self.tensor}

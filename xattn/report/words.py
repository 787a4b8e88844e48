"""The verdicts: what an effect shows, in plain words with its uncertainty."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from xattn.keys import show
from xattn.report.statistics import LEVEL, Effect
from xattn.system.screen import counted

if TYPE_CHECKING:
    from xattn.report.law import Interval
    from xattn.report.worth import Worth

Outcome = Literal["better", "worse", "higher", "lower", "undecided", "nothing"]


def number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def precision(metric: str) -> str:
    """Return the format: four decimals for losses, rates and shares; whole numbers for counts; else five digits."""
    if metric in ("step", "num_params", "flops_per_step", "peak_memory_bytes"):
        return ",.0f"
    return ".4f" if metric.endswith(("loss", "bpb")) or metric.startswith("probe/") else ",.5g"


def difference(effect: Effect) -> str:
    """Return ``+0.0123 [+0.0100, +0.0146]``."""
    found, form = effect.paired, f"+{precision(effect.metric)}"
    if found.difference is None:
        return "–"
    low, high = interval(effect)
    return number(found.difference, form) + ("" if low is None else f" [{number(low, form)}, {number(high, form)}]")


def interval(effect: Effect) -> tuple[float | None, float | None]:
    """Return the verdict's interval: Stein's where ``sweep.half_width`` chose the number of seeds, else Student's."""
    found = effect.paired if effect.stage is None else effect.stage
    return found.ci_low, found.ci_high


def better_is(metric: str) -> int:
    """Return −1 if less is better, 1 if more is, 0 if the metric has no direction."""
    if metric.endswith(("loss", "bpb")) or "loss_to_" in metric:
        return -1
    return 1 if metric.startswith("probe/") and re.search(r"/(accuracy|exact)", metric) else 0


def sentence(effects: Sequence[Effect]) -> str:
    """Return a sentence on the factor's arms that differ from the baseline, one on those that are not shown to, and one
    on each arm without an interval."""
    metric, baseline = effects[0].metric, show(effects[0].baseline)
    shown = [
        f"{show(effect.arm)} is {_direction(effect)} {baseline}, {metric} {difference(effect)}, "
        f"p {p_value(effect.p_holm)}{_diverged(effect)}"
        for effect in effects
        if is_shown(effect)
    ]
    parts = []
    if undecided := [effect for effect in effects if effect.p_holm is not None and not is_shown(effect)]:
        arms = [f"{show(e.arm)} ({difference(e)}, p {p_value(e.p_holm)}{_diverged(e)})" for e in undecided]
        parts.append(f"No difference in {metric} between {baseline} and {_listed(arms)} is shown")
    parts += [
        f"{show(effect.arm)} against {baseline}: {_unsure(effect)}{_diverged(effect)}"
        for effect in effects
        if effect.p_holm is None
    ]
    return ". ".join(["; ".join(shown), *parts] if shown else parts) + "."


def _unsure(effect: Effect) -> str:
    size = f"{effect.metric} {difference(effect)}"
    if effect.paired.seeds == 1:
        return f"{size} from one seed, so no interval"
    if effect.paired.seeds:
        return f"{size}, exactly the same in all {effect.paired.seeds} seeds, so no interval"
    return _why_nothing(effect)


def _why_nothing(effect: Effect) -> str:
    if effect.why_not:
        return f"the values of {effect.metric} are not comparable: {effect.why_not}"
    return "no seed finished in both arms"


def _diverged(effect: Effect) -> str:
    if not effect.diverged and not effect.baseline_diverged:
        return ""
    of_baseline = f"of {show(effect.baseline)} {effect.baseline_diverged} of {effect.baseline_ended}"
    return f", {effect.diverged} of {effect.ended} runs diverged, {of_baseline}"


def is_shown(effect: Effect) -> bool:
    """Return whether a difference is shown. If there is a simultaneous interval of Stein's, it must exclude zero; else
    the difference must be significant after Holm's correction."""
    if effect.stage is not None:
        return effect.stage.is_shown
    return effect.p_holm is not None and effect.p_holm <= 1 - LEVEL


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def verdict(effect: Effect) -> str:
    """Return sentences on an arm against its baseline. It is never called better if a larger share of it diverged."""
    worth = effect.worth
    if worth is None:
        return _of_loss(effect)
    if worth.steps is None:
        return f"{_of_loss(effect)} Its worth in the baseline's steps is not given: {worth.why_not}."
    return f"{_of_loss(effect)} It is {in_steps(worth)}."


def in_steps(worth: Worth) -> str:
    """Return ``equal to 1.18 × the baseline's steps [1.05, 1.31]; a step costs 1.07 × [1.04, 1.10]; net 1.10 × [0.97,
    1.25]``, each with its 95 % interval."""
    assert worth.steps is not None
    value, limits = _ratio(worth.steps)
    steps = f"equal to {value} × the baseline's steps {limits}"
    if worth.step_cost is None or worth.net is None:
        return f"{steps}; the cost of a step is not given: {worth.why_not}"
    cost, net = (" × ".join(_ratio(each)) for each in (worth.step_cost, worth.net))
    return f"{steps}; a step costs {cost}; net {net}"


def _ratio(found: Interval) -> tuple[str, str]:
    """Return ``1.18``, ``[1.05, 1.31]``."""
    value, low, high = (
        f"{each:.2f}" if each >= 0.1 else f"{each:.2g}" for each in (found.value, found.low, found.high)
    )
    return value, f"[{low}, {high}]"


def _of_loss(effect: Effect) -> str:
    found, arm, baseline = effect.paired, show(effect.arm), show(effect.baseline)
    tail = ""
    if effect.diverged or effect.baseline_diverged:
        of_others = "" if found.difference is None else "; the difference is over the others"
        tail = (
            f" Of the runs that ended, {effect.diverged} of {effect.ended} of {arm} diverged, and "
            f"{effect.baseline_diverged} of {effect.baseline_ended} of {baseline}{of_others}."
        )
    if found.difference is None:
        return f"{arm} cannot be compared with {baseline}: {_why_nothing(effect)}.{tail}"
    form = f"+{precision(effect.metric)}"
    size = f"{effect.metric} {number(found.difference, form)}"
    seeds = counted(found.seeds, "seed")
    low, high = interval(effect)
    if found.p is None or low is None or high is None:
        why = "one pair is not enough" if found.seeds == 1 else "all pairs differ by exactly the same amount"
        return f"{arm} against {baseline}: {size} ({seeds}); no interval can be given, because {why}.{tail}"
    facts = (
        f"{size}, 95 % interval {number(low, form)} to {number(high, form)}, {seeds}, "
        f"p {p_value(effect.p_holm)} after Holm"
    )
    if effect.comparisons > 1:
        facts += f" over {effect.comparisons} arms, {p_value(found.p)} before"
    if is_shown(effect):
        return f"{arm} is {_direction(effect)} {baseline}: {facts}.{_reached(effect)}{tail}"
    if effect.stage is not None:
        return f"No difference between {arm} and {baseline} is shown: {facts}.{_reached(effect)}{tail}"
    alone = ""
    if low > 0 or high < 0:
        alone = f" The interval is for this arm alone; Holm corrects p for {effect.comparisons} arms."
    return (
        f"No difference between {arm} and {baseline} is shown: {facts}.{alone} If seeds vary as much as these did, "
        f"such a study detects a difference of {number(effect.detectable, '.2g')} four times in five.{tail}"
    )


def _reached(effect: Effect) -> str:
    """Return what was requested of the interval, and whether the seeds suffice."""
    if (stage := effect.stage) is None:
        return ""
    form = precision(effect.metric)
    asked = f"±{number(stage.half_widths[-1], '.3g')}"
    if stage.is_reached:
        sentence = f" Known to ±{number(stage.half_width, form)}, where {asked} was asked for"
    else:
        more = counted(stage.needed - stage.pairs, "more seed")
        sentence = f" Known to ±{number(stage.half_width, form)}; {asked} takes {more}"
    at_once = f", for all {stage.comparisons} comparisons together" if stage.comparisons > 1 else ""
    return f"{sentence}{at_once}.{_extended(stage.half_widths)}"


def _extended(half_widths: Sequence[float]) -> str:
    """Return what it means that seeds were added for a further, smaller half-width."""
    if len(half_widths) == 1:
        return ""
    before = " and ".join(f"±{number(width, '.3g')}" for width in half_widths[:-1])
    return (
        f" The study was extended, after {before}: planned beforehand, each interval holds 19 times in 20; decided on "
        f"after a look at the result, at least one of the {len(half_widths)} misses in up to "
        f"{len(half_widths) * (1 - LEVEL):.0%} of studies."
    )


def signflip_note(seeds: int) -> str | None:
    """Return a note if there are too few seeds for a sign-flip p below 0.05: it is at least 2^(1−n)."""
    smallest = 2.0 ** (1 - seeds)  # if only the original signs and all signs flipped are as extreme
    if seeds < 2 or smallest <= 1 - LEVEL:
        return None
    return (
        f"Sign-flip test: with {counted(seeds, 'seed')} no p below {smallest:.4g} can be reached. The t test's smaller "
        "p rests on differences that are normally distributed."
    )


def outcome(effect: Effect) -> Outcome:
    """Return the verdict in one word.

    better, worse: a difference is shown, in a metric that has a direction. higher, lower: one is shown, but the metric
    has no direction, or the side with the better values diverged in a larger share of its runs. undecided: none is
    shown. nothing: there is no interval.
    """
    found, better = effect.paired, better_is(effect.metric)
    if found.difference is None or effect.p_holm is None:
        return "nothing"
    if not is_shown(effect):
        return "undecided"
    lower = found.difference < 0
    is_better = lower == (better < 0)
    if better == 0 or (effect.more_diverged > 0 if is_better else effect.more_diverged < 0):
        return "lower" if lower else "higher"
    return "better" if is_better else "worse"


def _direction(effect: Effect) -> str:
    """Return the comparative for a difference that is shown."""
    found = outcome(effect)
    assert effect.paired.difference is not None
    lower = effect.paired.difference < 0
    if better_is(effect.metric) != -1:
        return "lower than" if lower else "higher than"
    return {
        "lower": "lower where it did not diverge, but less stable, than",
        "higher": "higher where the baseline did not diverge, but more stable, than",
    }.get(found, f"{found} than")

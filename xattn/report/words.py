"""The verdicts: what an effect says, in plain words with its uncertainty."""

from __future__ import annotations

import re
from collections.abc import Sequence

from xattn.report.design import show
from xattn.report.statistics import LEVEL, Effect, smallest_signflip_p


def number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def precision(metric: str) -> str:
    """Four decimals for losses, rates and shares; whole numbers for what is counted; else five digits."""
    if metric in ("step", "num_params", "flops_per_step", "peak_memory_bytes"):
        return ",.0f"
    return ".4f" if metric.endswith(("loss", "bpb")) or metric.startswith("probe/") else ",.5g"


def difference(effect: Effect) -> str:
    """``+0.0123 [+0.0100, +0.0146]``"""
    found, form = effect.paired, f"+{precision(effect.metric)}"
    if found.difference is None:
        return "–"
    interval = f" [{number(found.ci_low, form)}, {number(found.ci_high, form)}]" if found.ci_low is not None else ""
    return number(found.difference, form) + interval


def better_is(metric: str) -> int:
    """−1 where less is better, 1 where more is, 0 where neither can be said."""
    if metric.endswith(("loss", "bpb")) or "loss_to_" in metric:
        return -1
    return 1 if metric.startswith("probe/") and re.search(r"/(accuracy|exact)", metric) else 0


def sentence(effects: Sequence[Effect]) -> str:
    """A sentence on a factor: what each of its arms does to the metric, against the baseline; another one each for the
    arms of which no difference is shown, and for those of which nothing is certain."""
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
    """Whether the difference is significant after Holm's correction."""
    return effect.p_holm is not None and effect.p_holm <= 1 - LEVEL


def counted(number: int, thing: str) -> str:
    """``1 seed``, ``3 seeds``"""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def verdict(effect: Effect) -> str:
    """One or two sentences on an arm against its baseline, never called better if a larger share of it diverged."""
    found, arm, baseline = effect.paired, show(effect.arm), show(effect.baseline)
    tail = ""
    if effect.diverged or effect.baseline_diverged:
        of_others = "" if found.difference is None else "; the difference is of the others"
        tail = (
            f" Of the runs that ended, {effect.diverged} of {effect.ended} of {arm} diverged, and "
            f"{effect.baseline_diverged} of {effect.baseline_ended} of {baseline}{of_others}."
        )
    if found.difference is None:
        return f"Nothing can be said of {arm} against {baseline}: {_why_nothing(effect)}.{tail}"
    form = f"+{precision(effect.metric)}"
    size = f"{effect.metric} {number(found.difference, form)}"
    seeds = counted(found.seeds, "seed")
    if found.p is None or found.ci_low is None or found.ci_high is None:
        why = "one pair is not enough" if found.seeds == 1 else "all pairs differ by exactly the same amount"
        return f"{arm} against {baseline}: {size} ({seeds}); no interval can be given, because {why}.{tail}"
    facts = (
        f"{size}, 95 % interval {number(found.ci_low, form)} to {number(found.ci_high, form)}, {seeds}, "
        f"p {p_value(effect.p_holm)} after Holm"
    )
    if is_shown(effect):
        return f"{arm} is {_direction(effect)} {baseline}: {facts}.{tail}"
    alone = ""
    if found.ci_low > 0 or found.ci_high < 0:
        alone = (
            f" The interval is of this arm alone; p is corrected for the {effect.comparisons} arms that were looked at."
        )
    return (
        f"No difference between {arm} and {baseline} is shown: {facts}.{alone} If seeds differ as much as these did, "
        f"such a study finds a difference of {number(effect.detectable, '.2g')} four times in five.{tail}"
    )


def signflip_note(seeds: int) -> str | None:
    """Said where so few seeds leave a sign-flip p no way below 0.05."""
    smallest = smallest_signflip_p(seeds)
    if seeds < 2 or smallest <= 1 - LEVEL:
        return None
    return (
        f"Sign-flip test: with {counted(seeds, 'seed')} no p below {smallest:.4g} can be reached. The t test's smaller "
        "p rests on differences that are normally distributed."
    )


def _direction(effect: Effect) -> str:
    assert effect.paired.difference is not None
    lower = effect.paired.difference < 0
    if better_is(effect.metric) != -1:
        return "lower than" if lower else "higher than"
    if lower and effect.more_diverged > 0:
        return "lower where it did not diverge, but less stable, than"
    if not lower and effect.more_diverged < 0:
        return "higher where the baseline did not diverge, but more stable, than"
    return "better than" if lower else "worse than"

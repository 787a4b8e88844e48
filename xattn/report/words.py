"""The verdicts: what an effect says, in plain words with its uncertainty."""

from __future__ import annotations

from xattn.report.design import show
from xattn.report.statistics import LEVEL, Effect, smallest_signflip_p


def number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def precision(metric: str) -> str:
    """Four decimals for losses, rates and shares; five digits for what may be of any size, such as speeds."""
    return ".4f" if metric.endswith(("loss", "bpb")) or metric.startswith("probe/") else ",.5g"


def difference(effect: Effect) -> str:
    """``+0.0123 [+0.0100, +0.0146]``"""
    found, form = effect.paired, f"+{precision(effect.metric)}"
    if found.difference is None:
        return "–"
    interval = f" [{number(found.ci_low, form)}, {number(found.ci_high, form)}]" if found.ci_low is not None else ""
    return number(found.difference, form) + interval


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
        return f"Nothing can be said of {arm} against {baseline}: no seed has both finished.{tail}"
    form = f"+{precision(effect.metric)}"
    size = f"{effect.metric} {number(found.difference, form)}"
    seeds = f"{found.seeds} seed" if found.seeds == 1 else f"{found.seeds} seeds"
    if found.p is None or found.ci_low is None or found.ci_high is None:
        why = "one pair has no spread" if found.seeds == 1 else "all pairs differ by the same"
        return f"{arm} against {baseline}: {size} ({seeds}); no interval can be given, because {why}.{tail}"
    facts = (
        f"{size}, 95 % interval {number(found.ci_low, form)} to {number(found.ci_high, form)}, {seeds}, "
        f"p {p_value(effect.p_holm)} after Holm"
    )
    if effect.p_holm is not None and effect.p_holm <= 1 - LEVEL:
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
    if seeds < 1 or smallest <= 1 - LEVEL:
        return None
    one = "1 seed" if seeds == 1 else f"{seeds} seeds"
    return (
        f"Sign-flip test: with {one} no p below {smallest:.4g} can be reached. The t test's smaller p rests on "
        "differences that are normally distributed."
    )


def _direction(effect: Effect) -> str:
    assert effect.paired.difference is not None
    lower = effect.paired.difference < 0
    if not effect.metric.endswith(("loss", "bpb")):
        return "lower than" if lower else "higher than"
    if lower and effect.more_diverged > 0:
        return "lower where it did not diverge, but less stable, than"
    if not lower and effect.more_diverged < 0:
        return "higher where the baseline did not diverge, but more stable, than"
    return "better than" if lower else "worse than"

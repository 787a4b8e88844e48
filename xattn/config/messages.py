"""The messages for a config that cannot be composed or is not valid."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError

from xattn.config.groups import choices_in, having, search_path
from xattn.config.schema import composed
from xattn.errors import BadInput, causes, did_you_mean, first_line
from xattn.keys import RENAMED, flatten, renamed
from xattn.model.config import LayerConfig
from xattn.system import entry

# What Hydra and omegaconf raise while composing: their own errors, and built-in ones for some malformed overrides.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError, TypeError, KeyError)


_QUOTING = (
    "Put a value with a space, a comma, brackets or other special characters in quotes:\n"
    """  'data.path="/some folder/a,b.txt"'"""
)


def explain(error: Exception, overrides: Sequence[str] = ()) -> str:
    """Return a message of at most five lines for an error that Hydra, omegaconf or we raise for these overrides."""
    for cause in causes(error):
        if isinstance(cause, BadInput):
            return str(cause)
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not a valid Hydra override; write key=value. {_QUOTING}"
    if "Ambiguous value" in text:
        return f"{first_line(error)}: several values make a sweep, which needs -m. {_QUOTING}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: required, for example {error.full_key}=…"
    if isinstance(error, MissingConfigException) and error.options:
        return _no_such_choice(error, error.options, overrides)
    if (message := _no_choice_at_all(overrides)) is not None:
        return message
    if isinstance(error, KeyError):
        return f"hydra.job.env_copy = {error.args[0]}: no such environment variable"
    if unknown := re.search(r"Could not override '([^']+)'|Interpolation key '([^']+)' not found", text):
        key = unknown[1] or unknown[2]
        if by := re.search(r"full_key: (hydra\.\S+)", text):
            return f"{by[1]}: refers to {key}, which is not defined where Hydra reads this key"
        group, _, leaf = key.rpartition(".")
        if group == "backend.then" and leaf in LayerConfig.model_fields:
            value = next((o.partition("=")[2] for o in overrides if o.partition("=")[0] == key), "…")
            return f"{key}: not set yet; add it with +{key}={value}, or 'backend.then={{{leaf}: {value}}}'"
        shown = "hydra" if key.startswith("hydra.") else "job"
        near = "" if shown == "hydra" else nearest_key(key, overrides)
        if key in RENAMED:
            near = f"; it is now {RENAMED[key]}"
        if key.startswith("hydra.sweeper.params."):
            near = f" yet; ++{key}=… adds it"
        return f"{key}: no such key{near}; `{entry.program()} --cfg {shown}` lists all keys"
    key_of_value = re.search(r"full_key: (\S+)", text)
    return f"{key_of_value[1]}: {first_line(error)}" if key_of_value else first_line(error)


_LOOSE = 0.5  # choices are few, so one that is only half like the word is worth a hint
_WITH_PRESETS = ("backend", "experiment")  # a published attention is a choice of one of them


def _no_such_choice(error: MissingConfigException, options: Sequence[str], arguments: Sequence[str]) -> str:
    """Name the group as it is typed, and the file that asks for the choice if the user did not."""
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    asked_by = re.match(r"In '([^']+)'", str(error))
    where = "" if asked_by is None or asked_by[1] in ("config", "hydra/config") else f"{asked_by[1]}.yaml: "
    others = [other for other in _WITH_PRESETS if other != group and choice in choices_in(other, arguments)]
    elsewhere = f" (did you mean {others[0]}={choice}?)" if group in _WITH_PRESETS and others else ""
    near = elsewhere or did_you_mean(choice, options, cutoff=_LOOSE)
    return f"{where}{group} = {choice}: no such choice{near}; allowed: {', '.join(options)}"


def _no_choice_at_all(overrides: Sequence[str]) -> str | None:
    """Return a message if a group is given null, a number, a list or a mapping: Hydra's own does not name the group."""
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        options = choices_in(group, overrides)
        if options and re.fullmatch(r"null|true|false|[-+.\d{\[].*", value, re.IGNORECASE):
            hint = " (leave it out for none)" if override == "experiment=null" else ""
            return f"{group} = {value}: no such choice{hint}; allowed: {', '.join(options)}"
    return None


def explain_validation(
    error: ValidationError, raw: Mapping[str, Any], *, at: str = "", overrides: Sequence[str] = ()
) -> str:
    expected: dict[str, list[str]] = {}  # key → what each member of its type allows
    given: dict[str, str] = {}
    nearest: dict[str, str] = {}
    details = error.errors(include_url=False)
    for detail in details:
        if detail["type"] == "too_short" and len(details) > 1:
            continue  # pydantic counts a list's good items; the bad ones have lines of their own
        kind, context = detail["type"], detail.get("ctx", {})
        key = at + _dotted(detail["loc"], raw)
        message = re.sub(r"^(Value error, |Input should be )", "", detail["msg"])
        if kind == "extra_forbidden":
            message, nearest[key] = "no such key", nearest_key(key, ())
        elif kind == "missing":
            message = f"required, for example {key}=…"
        elif kind == "string_pattern_mismatch":
            message = "may contain letters, digits, '.', '_' and '-'; the first must be a letter or a digit"
        elif kind == "string_type":
            message = f"text{_quoting(key, overrides)}"
            given[key] = _short(detail["input"])
        elif kind == "model_type":
            message = "a mapping" + (", such as {activation: softmax}" if key.endswith("then") else "")
        elif kind == "tuple_type":
            message = f"a list, [{detail['input']}]" if isinstance(detail["input"], str) else "a list"
        elif kind == "union_tag_invalid":
            key, message = f"{key}.name", str(context["expected_tags"])
            given[key], nearest[key] = (
                repr(context["tag"]),
                did_you_mean(context["tag"], re.findall(r"'(.*?)'", message), cutoff=_LOOSE),
            )
        elif kind == "literal_error":
            nearest[key] = did_you_mean(
                str(detail["input"]), re.findall(r"'(.*?)'", context["expected"]), cutoff=_LOOSE
            )
        expected.setdefault(key, []).append(message)
        if kind != "missing" and not isinstance(detail["input"], Mapping):
            given[key] = _short(detail["input"])
    lines = []
    for key, messages in expected.items():
        value = f" = {given[key]}" if key in given else ""
        rule = " or ".join(messages)
        if not rule.startswith(("no such", "required", "may contain")) and key in given:
            rule = f"must be {rule}"
        lines.append(f"{key}{value}: {rule}{nearest.get(key, '')}")
    return "\n".join(lines if len(lines) <= 5 else [*lines[:4], f"and {len(lines) - 4} more"])


def _quoting(key: str, overrides: Sequence[str]) -> str:
    """Explain how to type a text that Hydra's grammar reads as a number, a boolean, null or a list."""
    if "[" in key:
        return ", in quotes"
    values = [override.partition("=")[2] for override in overrides if override.lstrip("+").partition("=")[0] == key]
    typed = values[-1] if values and re.fullmatch(r"[^'\",(]+", values[-1]) else "…"
    return f"""; quote it: '{key}="{typed}"'"""


def _dotted(loc: Sequence[int | str], raw: Mapping[str, Any]) -> str:
    """Return the key as a user types it: pydantic's path without the names of union members."""
    found = ""
    node: Any = raw
    for i, part in enumerate(loc):
        if isinstance(node, Mapping) and (part in node or i == len(loc) - 1):
            found += f".{part}" if found else str(part)
            node = node.get(part)
        elif isinstance(node, list | tuple) and isinstance(part, int) and part < len(node):
            found += f"[{part}]"
            node = node[part]
    return found


def nearest_key(key: str, overrides: Sequence[str]) -> str:
    group, _, name = key.rpartition(".")
    if choices := having(group, name, overrides):
        return f" here; {' and '.join(choices)} {'has' if len(choices) == 1 else 'have'} it"
    choices = [override for override in overrides if re.fullmatch(r"\+?[\w/]+=[\w-]+", override)]
    try:
        known = composed([*choices, *search_path(overrides)])
    except COMPOSITION_ERRORS:
        known = composed(())
    keys = [k for k, _ in flatten(OmegaConf.to_container(known, resolve=False))] + [str(k) for k in known]
    return nearest_of(key, keys)


def nearest_of(key: str, keys: Sequence[str]) -> str:
    """Return `` (did you mean KEY?)`` with the most similar key, by either name of a renamed one; empty without one."""

    def likeness(candidate: str) -> float:
        """Compare mostly the last word: users forget or mistake the group more often than the key."""
        typed, known = key.rpartition(".")[2], candidate.rpartition(".")[2]
        initials = "".join(word[0] for word in known.split("_") if word)
        leaf = 0.9 if typed == initials and len(typed) > 1 else _similar(typed, known)
        return 0.8 * leaf + 0.2 * _similar(key, candidate) if leaf >= 0.6 else 0.0

    best = max([*keys, *(old for old, new in RENAMED.items() if new in keys)], key=likeness)
    return f" (did you mean {renamed(best)}?)" if likeness(best) else ""


def _similar(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"

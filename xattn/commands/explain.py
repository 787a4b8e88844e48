"""``xattn explain KEY``: the meaning, allowed values and default of a config key.

Types and meanings come from the config's classes, through pydantic's JSON schema; defaults come from conf/. The same
source makes docs/configuration.md, docs/config.schema.json and the comments of ``--help``. Importing this module
imports no jax.

    xattn explain --markdown > docs/configuration.md
    xattn explain --schema > docs/config.schema.json
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import xattn.config
from xattn.config import config_type
from xattn.errors import BadInput, ExitCode
from xattn.keys import renamed, show
from xattn.report.defaults import choice_values, conf_defaults
from xattn.section import CONF
from xattn.system.arguments import Parser

_OTHER_GROUPS = {
    "experiment": "A prepared experiment; it may set any key.",
    "hydra/launcher": "Where the runs of a sweep are trained.",
    "hydra/sweeper": "Which runs a sweep makes.",
}


@dataclass(frozen=True)
class Entry:
    """The meaning of one dotted key.

    A key such as ``optimizer.momentum`` may have different meanings under different choices of its group; each meaning
    then has its own entry.
    """

    key: str
    values: str
    """The allowed values: ``none | rmsnorm``, ``a whole number > 0``."""
    meaning: str
    choices: tuple[str, ...] = ()
    """The choices of its group that have the key; empty if all of them do."""

    @property
    def group(self) -> str:
        return self.key.partition(".")[0] if "." in self.key else ""

    @property
    def under(self) -> str:
        """``optimizer=muon, sgd``; empty for a key that every choice has."""
        return f"{self.group}={', '.join(self.choices)}" if self.choices else ""

    @property
    def default(self) -> str:
        """The value under ``python train.py``; if that has no such key, the value in each choice that has it."""
        defaults = conf_defaults()
        chosen = defaults.get(f"{self.group}.name")
        if self.key in defaults and (not self.choices or chosen in self.choices):
            return show(defaults[self.key])
        name, registered = self.key.partition(".")[2], xattn.config.registered_choices(self.group)
        own = {choice: registered.get(choice) or choice_values(CONF / self.group, choice) for choice in self.choices}
        found = {choice: values[name] for choice, values in own.items() if name in values}
        if len(set(map(_typed, found.values()))) == 1:
            return _typed(next(iter(found.values())))
        return ", ".join(f"{_typed(value)} ({choice})" for choice, value in found.items()) or "none"


def _typed(value: Any) -> str:
    return "required" if value == "???" else show(value)


@cache
def entries() -> tuple[Entry, ...]:
    """Return all keys in the order of the config's classes, except those inside ``backend.then`` and lists."""
    schema = config_type().model_json_schema()
    found: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for key, part, choice in _leaves(schema, schema["$defs"]):
        meaning = " ".join(part.get("description", "").split())
        entry = (key, _values(part, schema["$defs"]), meaning)
        found[entry] = (*found.get(entry, ()), *([choice] if choice else []))
    every = {group: len(_choices_of(part)) for group, part in schema["properties"].items()}
    return tuple(
        Entry(*entry, choices=() if len(choices) == every.get(entry[0].partition(".")[0]) else choices)
        for entry, choices in found.items()
    )


def _leaves(schema: Mapping[str, Any], named: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield key, schema, and the choice of its group if the group has several kinds."""
    for group, part in schema["properties"].items():
        if kinds := _choices_of(part):
            for choice, kind in kinds.items():
                yield from ((f"{group}.{key}", leaf, choice) for key, leaf in _within(named[kind], named))
        elif "$ref" in part:
            yield from ((f"{group}.{key}", leaf, "") for key, leaf in _within(named[_name(part)], named))
        else:
            yield group, part, ""


def _choices_of(part: Mapping[str, Any]) -> dict[str, str]:
    """Return choice → the schema name of its class, for a group that has several kinds."""
    kinds: Mapping[str, str] = part.get("discriminator", {}).get("mapping", {})
    return {choice: path.rpartition("/")[2] for choice, path in kinds.items()}


def _within(section: Mapping[str, Any], named: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, part in section["properties"].items():
        if "$ref" in part:
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in _within(named[_name(part)], named))
        elif "const" not in part:  # a const is the name of a choice
            yield key, part


def _name(part: Mapping[str, Any]) -> str:
    return str(part["$ref"]).rpartition("/")[2]


_KINDS = {"integer": "a whole number", "number": "a number", "string": "text", "null": "null", "object": "a mapping"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _values(part: Mapping[str, Any], named: Mapping[str, Any]) -> str:
    if "anyOf" in part:
        return " | ".join(dict.fromkeys(_values(each, named) for each in part["anyOf"]))
    if "enum" in part or "const" in part:
        return " | ".join(map(show, part.get("enum", [part.get("const")])))
    if part.get("type") == "boolean":
        return "true | false"
    if part.get("type") == "array":
        return f"a list of {_values(part['items'], named).replace('a mapping', 'mappings')}"
    bounds = [f"{sign} {show(part[bound])}" for bound, sign in _BOUNDS.items() if bound in part]
    kind = _KINDS["object" if "$ref" in part else part.get("type", "object")]
    return f"{kind} {' and '.join(bounds)}".strip()


def explain(key: str) -> str:
    """Return the text for a key, or for a group with all its keys. Raises :class:`BadInput` if it is neither."""
    key = renamed(key)
    if found := [entry for entry in entries() if entry.key == key]:
        return "\n".join(map(_in_full, found))
    inside = [entry for entry in entries() if entry.key.startswith(f"{key}.")]
    choices = [*xattn.config.choices_in(key), *xattn.config.registered_choices(key)]
    if not inside and not choices:
        groups = dict.fromkeys(entry.group for entry in entries() if entry.group)
        near = xattn.config.nearest_of(key, [*(entry.key for entry in entries()), *groups, *_OTHER_GROUPS])
        raise BadInput(f"{key}: no such key{near}; `xattn explain` lists all keys")
    width = max(map(len, choices), default=0)
    lines = [f"  {key}={choice:{width}}  {headline(key, choice)}".rstrip() for choice in choices]
    return "\n".join([key, *lines, *_in_lines(inside)])


def _in_full(entry: Entry) -> str:
    meaning = textwrap.wrap(entry.meaning, 100, initial_indent="  ", subsequent_indent="  ")
    under = f"   ({entry.under})" if entry.under else ""
    return "\n".join([f"{entry.key}{under}", f"  {entry.values}; default: {entry.default}", *meaning])


def _in_lines(found: Sequence[Entry]) -> list[str]:
    set_to = [f"  {entry.key} = {entry.default}" for entry in found]
    width = max((len(text) for text in set_to if len(text) <= 40), default=0)
    return [
        f"{text:{width}}   {entry.values}" + (f"   ({entry.under})" if entry.under else "")
        for text, entry in zip(set_to, found, strict=True)
    ]


def headline(group: str, choice: str) -> str:
    """Return what a choice is: the first sentence of its file's comment, or the first line of its class docstring."""
    file = xattn.config.choices_in(group).get(choice)
    text = "" if file is None else file.read_text("utf-8")
    lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    comment = " ".join(line.strip() for line in lines if not line.startswith("@package"))
    if comment:
        sentence = re.match(r"(Question: )?(.*?[.?])(?= |$)", comment)
        return sentence[2] if sentence else comment
    described = config_type().model_json_schema()
    kind = _choices_of(described["properties"].get(group, {})).get(choice)
    about = described["$defs"][kind]["description"].splitlines()[0] if kind else ""
    return str(about).partition("``: ")[2]


def annotated(text: str) -> str:
    """Add a comment with the allowed values to each key of a config in YAML."""
    lines, path, chosen = [], list[str](), dict[str, str]()
    for line in text.splitlines():
        if found := re.match(r"( *)(\w+):( \S+)?", line):
            path = [*path[: len(found[1]) // 2], found[2]]
            if path[1:] == ["name"]:
                chosen[path[0]] = (found[3] or "").strip()
            known = [entry for entry in entries() if entry.key == ".".join(path)]
            values = [each.values for each in known if not each.choices or chosen.get(path[0]) in each.choices]
            if values:
                start, *more = textwrap.wrap(values[0], max(20, 76 - max(32, len(line))), subsequent_indent="  ")
                line = "\n".join([f"{line:32}  # {start}", *(f"{'':32}  # {rest}" for rest in more)])
        lines.append(line)
    return "\n".join(lines)


def markdown() -> str:
    """Return the page docs/configuration.md."""
    named = config_type().model_json_schema()
    lines = [_HEAD]
    for group, part in named["properties"].items():
        rows = [entry for entry in entries() if entry.key == group or entry.group == group]
        if "$ref" in part or _choices_of(part):
            names = ", ".join(f"`{group}={choice}`" for choice in xattn.config.choices_in(group))
            lines += ["", f"## {group}", "", f"Choices: {names}.", ""]
            lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
            lines += [_row(entry) for entry in rows]
    lines += ["", "## Keys of no group", "", "| key | values | default | meaning |", "|---|---|---|---|"]
    lines += [_row(entry) for entry in entries() if not entry.group]
    for group, meaning in _OTHER_GROUPS.items():
        lines += ["", f"## {group}", "", meaning, "", "| choice | |", "|---|---|"]
        choices = xattn.config.choices_in(group)
        lines += [f"| `{group}={choice}` | {headline(group, choice)} |" for choice in choices]
    return "\n".join(lines)


_HEAD = """# Configuration

Every key that can be set, from the config's classes in `xattn/` and the values in `conf/`. `xattn explain KEY` explains
one key; `python train.py --help` lists all with their values. `xattn explain --markdown` generates this page.

For completion and checks in an editor with a YAML language server, put this at the head of an experiment of your own,
with the path to `docs/config.schema.json` (also printed by `xattn explain --schema`):

    # yaml-language-server: $schema=../docs/config.schema.json

For completion of keys and choices in bash: `eval "$(python train.py -sc install=bash)"` (or zsh, fish)."""


def _row(entry: Entry) -> str:
    under = f" ({entry.under})" if entry.under else ""
    cells = (f"`{entry.key}`{under}", entry.values, entry.default, entry.meaning.replace("``", "`"))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def schema() -> dict[str, Any]:
    """Return a JSON schema of experiment files: any part of a config, besides Hydra's own keys."""

    def partial(node: Any) -> Any:
        if isinstance(node, list):
            return [partial(each) for each in node]
        if not isinstance(node, Mapping):
            return node
        kept = {key: partial(value) for key, value in node.items() if key not in ("required", "discriminator")}
        if isinstance(kept.get("title"), str):
            del kept["title"]
        return {"anyOf" if key == "oneOf" else key: value for key, value in kept.items()}

    found = partial(config_type().model_json_schema())
    found["properties"] |= {"defaults": {"type": "array"}, "hydra": {"type": "object"}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "An experiment of xattn", **found}


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="xattn explain", description="Explain a key of the config: its meaning, allowed values and default."
    )
    parser.add_argument("key", nargs="*", metavar="KEY", help="such as model.qk_norm, or a group; default: all keys")
    parser.add_argument("--markdown", action="store_true", help="print docs/configuration.md")
    parser.add_argument("--schema", action="store_true", help="print a JSON schema of experiment files, for editors")
    asked = parser.parse_args(argv)
    if asked.markdown:
        print(markdown())
    elif asked.schema:
        print(json.dumps(schema(), indent=1))
    else:
        print("\n".join(map(explain, asked.key)) if asked.key else "\n".join(_in_lines(entries())))
    return ExitCode.DONE

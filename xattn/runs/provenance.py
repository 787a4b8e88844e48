"""Where a run comes from, as provenance.json records it. Imports no jax; what jax knows is passed in."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType
from typing import Any

from xattn import registry
from xattn.data.config import DataConfig, made_by
from xattn.section import CONF
from xattn.system import entry
from xattn.tracking.wandb import run_id

_PACKAGE = Path(__file__).resolve().parent.parent
_PACKAGES = [
    *("xattn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("hydra-core", "omegaconf", "pydantic", "wandb", "tokenizers"),
]


def versions() -> dict[str, str]:
    """Return package → version for what a result may depend on, python among them."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source_sha256() -> str:
    """Return one SHA-256 over the package's modules and conf's YAML files; a clone and an installation agree."""
    digest = hashlib.sha256()
    files = {Path("conf") / file.relative_to(CONF): file for file in CONF.rglob("*.yaml")}
    files |= {Path("xattn") / file.relative_to(_PACKAGE): file for file in _PACKAGE.rglob("*.py")}
    for name, file in sorted(files.items()):
        content = file.read_bytes()
        digest.update(f"{name.as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def registered() -> dict[str, str]:
    """Return file name → SHA-256 for the user's own files that registered something in this process.

    A function from a notebook or a prompt has no file; the digest is then of its source, or else of its byte code.
    """
    contents: dict[str, dict[bytes, None]] = {}
    for addition in registry.additions():
        contents.setdefault(addition.file.name, {})[_content(addition)] = None
    return {name: hashlib.sha256(b"\0".join(parts)).hexdigest() for name, parts in contents.items()}


def _content(addition: registry.Addition) -> bytes:
    with contextlib.suppress(OSError):
        return addition.file.read_bytes()
    with contextlib.suppress(OSError, TypeError):  # TypeError: a class defined at a prompt
        return inspect.getsource(addition.source).encode()
    return b"\0".join(_byte_code(function.__code__) for function in addition.functions)


def _byte_code(code: CodeType) -> bytes:
    constants = [_byte_code(each) if isinstance(each, CodeType) else repr(each).encode() for each in code.co_consts]
    return b"\0".join([code.co_code, repr(code.co_names).encode(), *constants])


def git_state() -> tuple[str | None, bool | None]:
    """Return the checkout's commit and whether its tracked files differ from it; None outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return commit, None if status is None else bool(status)


def provenance() -> dict[str, Any]:
    """Return the part of provenance.json that needs neither jax nor data."""
    commit, dirty = git_state()
    own_files = registered()
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": versions(),
        "source_sha256": source_sha256(),
        "host": socket.gethostname(),
        "command": f"{entry.program()} {shlex.join(sys.argv[1:])}".strip(),
        "cwd": os.getcwd(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "wandb_id": run_id(),
        **({"registered": own_files} if own_files else {}),
    }


def corpus(data: DataConfig, size: int | None) -> dict[str, Any]:
    """Return ``corpus`` of provenance.json: its name, the bytes of its files, and the versions of what made it.

    Its hash is ``data_sha256``, which covers the tokenizer too.
    """
    here = versions()
    return {"name": data.name, "bytes": size, **{package: here[package] for package in made_by(data)}}


def other_data(
    what: str, data: DataConfig, before: Mapping[str, Any], *, size: int | None, sha256: str, to: str
) -> str:
    """Return a message for data that are not those of the run with this provenance, naming versions that explain it.

    what: the sentence that the message begins with. to: the verb for what the user does with the run.
    """
    then, here = before.get("versions") or {}, versions()
    others = [each for each in made_by(data) if then.get(each) not in (None, here[each])]
    if not others:
        return f"{what} (sha256 {sha256[:12]}…, was {before['data_sha256'][:12]}…); restore them"
    began_with, runs_on = (", ".join(_named(each, of[each]) for each in others) for of in (then, here))
    return (
        f"{what}: the run began with {began_with} (corpus of {_corpus_of(before)}), but this is {runs_on} "
        f"({_in_words(size, sha256)})\n{to} it with {began_with}"
    )


def other_library(data_name: str, before: Mapping[str, Any] | None) -> str | None:
    """Return a message that the corpus was another one, for a ``data=python_stdlib`` run made by another Python.

    A finished run is shown without looking at its data, and no two releases of Python have the same library.
    """
    if before is None or data_name != "python_stdlib":
        return None
    then, here = (before.get("versions") or {}).get("python"), versions()["python"]
    if then in (None, here):
        return None
    return f"the corpus was the library of Python {then} ({_corpus_of(before)}), not that of this Python {here}"


def _named(package: str, version: str) -> str:
    return f"{'Python' if package == 'python' else package} {version}"


def _corpus_of(provenance: Mapping[str, Any]) -> str:
    return _in_words((provenance.get("corpus") or {}).get("bytes"), provenance.get("data_sha256") or "")


def _in_words(size: int | None, sha256: str) -> str:
    return (f"{size:,} bytes, " if size is not None else "") + f"sha256 {sha256[:12]}…"


def changes(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Return the keys of provenance.json that a result may depend on, that both have, and that differ."""
    keys = ("source_sha256", "registered", "versions", "device_kind", "device_count", "process_count", "mesh", "pack")
    return [key for key in keys if before is not None and key in before and key in now and before[key] != now[key]]


def _git(*arguments: str) -> str | None:
    root = _PACKAGE.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

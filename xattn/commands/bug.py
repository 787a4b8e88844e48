"""``xattn bug RUN``: pack what a bug report needs into a small archive, and list its contents."""

from __future__ import annotations

import io
import os
import platform
import re
import socket
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xattn.errors import BadInput, ExitCode, writing
from xattn.runs import run_folder
from xattn.runs.provenance import git_state, source_sha256, versions
from xattn.system.arguments import Parser

_WHOLE = (run_folder.CONFIG, run_folder.OVERRIDES, run_folder.PROVENANCE, run_folder.SUMMARY)
_AT_MOST = 200_000  # characters of a file; a longer one keeps its end
_ROWS = 200  # the last rows of metrics.jsonl
_SAMPLE = re.compile(
    r"^a sample at temperature [^\n]*\n.*?(?=^result {6}(?:val_loss \d|no finite)|\Z)", re.DOTALL | re.MULTILINE
)
_LEFT_OUT = "a sample at temperature …: left out of this archive\n"
# A secret is recognised by the name it is assigned to, or by the form that our services give their keys.
_NAMED = r"\w*(?:api_?key|secret|passw(?:or)?d|credential|(?:hf|auth|access|api)_token)\w*"
_ASSIGNED = re.compile(rf"""(\b{_NAMED}["']?\s*[=:]\s*)("[^"\n]*"|'[^'\n]*'|[^\s"',}}]+)""", re.IGNORECASE)
_SPELLED = re.compile(r"\b(?:hf_|wandb_v\d_)\w{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_PLACE = re.compile(r"https?://[^\s'\"]+|(?<![\w/.:])/[\w.~+-]+(?:/[\w.~+-]+)+")


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="xattn bug",
        description="Pack a run's config, provenance, summary, log and last metrics for a report of a bug: no text of "
        "the corpus, no samples, no checkpoints, no keys.",
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the archive (default: xattn-bug-NAME.tar.gz in this folder)"
    )
    asked = parser.parse_args(argv)
    run = asked.run.absolute()
    if not (run / run_folder.CONFIG).is_file():
        raise BadInput(f"{asked.run}: not a run folder: it has no {run_folder.CONFIG}")
    target = asked.out or Path(f"xattn-bug-{run.name}.tar.gz")
    if target.exists():
        raise BadInput(f"{target}: already exists; name another file with --out FILE")
    files = contents(run)
    with writing(target):
        run_folder.write_atomically(target, _archive(f"xattn-bug-{run.name}", files), shared=True)
    print("\n".join(_told(target, files)))
    return ExitCode.DONE


def contents(run: Path) -> dict[str, str]:
    """Return file name → text for the archive of this run; a file that the run lacks is left out.

    The home folder becomes ``~``, host names ``HOST``, and whatever looks like a key or password ``REMOVED``.
    """
    found = {name: text for name in _WHOLE if (text := _text(run / name)) is not None}
    if (log := _text(run / run_folder.LOG)) is not None:
        found[run_folder.LOG] = _SAMPLE.sub(_LEFT_OUT, log)[-_AT_MOST:]
    if (rows := _text(run / run_folder.METRICS)) is not None:
        found[run_folder.METRICS] = "".join(rows.splitlines(keepends=True)[-_ROWS:])[-_AT_MOST:]
    commit, dirty = git_state()
    now: dict[str, Any] = {"versions": versions(), "platform": platform.platform(), "machine": platform.machine()}
    now |= {"cpus": os.cpu_count(), "git_commit": commit, "git_dirty": dirty, "source_sha256": source_sha256()}
    found["now.json"] = run_folder.to_json(now, indent=2) + "\n"
    own_names = _names_of_here(run)
    return {name: _without_secrets(text, own_names) for name, text in found.items()}


def _text(path: Path) -> str | None:
    """Return the file's text even if it is damaged: that may be the bug."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return None


def _names_of_here(run: Path) -> dict[str, str]:
    """Return names of this machine and of the one the run was made on → their replacements."""
    made_on = run_folder.read_or_empty(run / run_folder.PROVENANCE).get("host")
    hosts = {host for host in (socket.gethostname(), made_on) if isinstance(host, str) and len(host) > 1}
    return {str(Path.home()): "~"} | dict.fromkeys(sorted(hosts, key=len, reverse=True), "HOST")


def _without_secrets(text: str, names: Mapping[str, str]) -> str:
    for variable, value in os.environ.items():
        if re.fullmatch(_NAMED, variable, re.IGNORECASE) and len(value) >= 8:
            text = text.replace(value, "REMOVED")
    text = _SPELLED.sub("REMOVED", _ASSIGNED.sub(r"\1REMOVED", text))
    for name, stands_for in names.items():
        if len(name) > 1:  # a home of "/" would be in every path
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", stands_for, text)
    return text


def _archive(folder: str, files: Mapping[str, str]) -> bytes:
    """Return the files, in a folder of that name, as .tar.gz."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in files.items():
            content = text.encode()
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _told(target: Path, files: Mapping[str, str]) -> list[str]:
    """Return what the user should look at before passing the archive on."""
    lines = [f"{target}: {target.stat().st_size:,} bytes; nothing was sent. It contains:"]
    lines += [f"  {name:18}{len(text.encode()):>9,} bytes" for name, text in files.items()]
    if places := sorted({place for text in files.values() for place in _PLACE.findall(text)}):
        lines += ["paths that it mentions (~ is your home folder):", *(f"  {place}" for place in places)]
    return [*lines, "check it, then attach it to your issue"]

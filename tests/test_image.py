"""The Dockerfile, checked by reading it: tests have no daemon to build it with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def copied() -> list[str]:
    """The paths of this checkout that the image takes."""
    lines = re.findall(r"^COPY (.+)$", DOCKERFILE, re.M)
    return [source for line in lines for source in line.split()[:-1]]


def test_what_the_image_copies_is_there_and_sent_to_the_daemon() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert len(copied()) >= 6
    for path in copied():
        assert (ROOT / path).exists(), path
        assert Path(path).parts[0] in sent, path


def test_the_image_has_all_that_the_wheel_is_built_from() -> None:
    project, wheel = PROJECT["project"], PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {project["readme"], *project["license-files"], *wheel["only-include"], "pyproject.toml"} <= set(copied())


def test_the_image_installs_what_the_lock_has_and_nothing_else() -> None:
    """tests/test_forge.py compares the lock with pyproject.toml."""
    assert "uv.lock" in copied()
    installs = re.findall(r"^RUN (uv sync .+)$", DOCKERFILE, re.M)
    assert len(installs) == 2
    for install in installs:
        assert "--frozen" in install.split()
        extras = re.findall(r'--extra "?([$\w]+)', install)
        assert {extra for extra in extras if extra != "$EXTRA"} <= set(PROJECT["project"]["optional-dependencies"])
    assert "--no-editable" in installs[-1], "the source's folder is not the user's"


def test_the_image_trains_as_a_user_without_rights() -> None:
    lines = DOCKERFILE.splitlines()
    assert lines.index("USER xattn") < lines.index('ENTRYPOINT ["xattn", "train"]')
    assert "WORKDIR /work" in lines
    assert set(re.findall(r"EXTRA=(\w+)", DOCKERFILE)) <= set(PROJECT["project"]["optional-dependencies"])

"""The Dockerfile, read: no test here has a daemon to build it with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def copied() -> list[str]:
    """The paths of this checkout that the image takes."""
    lines = re.findall(r"^COPY (.+)$", DOCKERFILE, re.M)
    return [source for line in lines for source in line.split()[:-1]]


def locked(path: Path) -> dict[str, str]:
    """Package → its one version. Raises an error for a line that pip would not read."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    versions = {}
    for requirement in map(Requirement, lines):
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        versions[canonicalize_name(requirement.name)] = specifier.version
    return versions


def test_what_the_image_copies_is_there_and_sent_to_the_daemon() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert len(copied()) >= 6
    for path in copied():
        assert (ROOT / path).exists(), path
        assert Path(path).parts[0] in sent, path


def test_the_image_has_all_that_the_wheel_is_built_from() -> None:
    project, wheel = PROJECT["project"], PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {project["readme"], *project["license-files"], *wheel["only-include"], "pyproject.toml"} <= set(copied())


def test_the_image_installs_the_lock_of_its_python() -> None:
    (python,) = re.findall(r"^FROM python:([\d.]+)-slim$", DOCKERFILE, re.M)
    assert f"locks/python{python}.txt" in copied()
    assert locked(ROOT / "locks" / f"python{python}.txt")["jax"]


@pytest.mark.parametrize("lock", sorted((ROOT / "locks").glob("*.txt")), ids=lambda path: path.stem)
def test_a_lock_satisfies_what_the_package_depends_on(lock: Path) -> None:
    """The image installs xattn without dependencies: what a lock lacks, it would lack."""
    extras, versions = PROJECT["project"]["optional-dependencies"], locked(lock)
    python = {"python_version": lock.stem.removeprefix("python")}
    for text in [*PROJECT["project"]["dependencies"], *extras["slurm"], *extras["tune"], *extras["hf"]]:
        needed = Requirement(text)
        if needed.marker is None or needed.marker.evaluate(python):
            assert needed.specifier.contains(versions[canonicalize_name(needed.name)]), needed


def test_the_image_trains_as_a_user_without_rights() -> None:
    lines = DOCKERFILE.splitlines()
    assert lines.index("USER xattn") < lines.index('ENTRYPOINT ["xattn", "train"]')
    assert "WORKDIR /work" in lines
    assert set(re.findall(r"EXTRA=(\w+)", DOCKERFILE)) <= set(PROJECT["project"]["optional-dependencies"])

"""The files that a forge reads: they are valid for it, and its jobs do what .ci/run does."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import xattn

ROOT = Path(__file__).resolve().parent.parent


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load((ROOT / name).read_text("utf-8"), yaml.BaseLoader)  # "on" stays a word
    return loaded


def steps(name: str) -> list[str]:
    """The commands of a workflow's jobs."""
    return [step["run"] for job in read(name)["jobs"].values() for step in job["steps"] if "run" in step]


def test_the_jobs_do_what_has_to_pass_here() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    checks = [line.strip() for line in script if line.strip().startswith(("pytest", "ruff", "lint-imports", "mypy"))]
    assert len(checks) >= 6
    assert set(checks) <= set(steps(".github/workflows/tests.yml"))
    pythons = {
        step["with"]["python-version"]
        for job in read(".github/workflows/tests.yml")["jobs"].values()
        for step in job["steps"]
        if "python-version" in step.get("with", {})
    }
    assert pythons == {"3.11", "3.13"}


def test_workflows_name_what_starts_them_and_may_only_read() -> None:
    for name in ("tests", "wheel"):
        workflow = read(f".github/workflows/{name}.yml")
        assert "pull_request" in workflow["on"]
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            assert job["runs-on"] == "ubuntu-latest"
            assert all("uses" in step or "run" in step for step in job["steps"])


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", xattn.__version__)
    assert all("name" in author or "family-names" in author for author in citation["authors"])


def test_the_template_asks_for_the_archive() -> None:
    template = read(".github/ISSUE_TEMPLATE/bug.yml")
    assert {"name", "description", "body"} <= template.keys()
    assert "xattn bug RUN" in str(template["body"])
    fields = [field for field in template["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_the_lock_file_has_what_is_depended_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    locked = tomllib.loads((ROOT / "uv.lock").read_text("utf-8"))["package"]
    versions = {package["name"]: package.get("version", "") for package in locked}
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name == "xattn":
            continue
        assert name in versions, f"uv lock adds {name}"
        assert requirement.specifier.contains(versions[name], prereleases=True), f"{requirement}: uv lock renews it"

"""deploy/Dockerfile, which is built nowhere here: a linter reads it, and what it copies and installs is here."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.machine import clean_environment

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
Stages = dict[str, list[tuple[str, str]]]


def stages(text: str) -> Stages:
    """Instructions and their arguments, by the stage's name; the last one's is `image`."""
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    found: Stages = {}
    for name, _, arguments in (line.partition(" ") for line in lines if line.strip()):
        if name == "FROM":
            found[arguments.partition(" AS ")[2] or "image"] = []
        if found:
            list(found.values())[-1].append((name, " ".join(arguments.split())))
    return found


def made() -> list[str]:
    """What `make .venv` runs."""
    command = ["make", "--dry-run", "--always-make", "PYTHON=python", ".venv"]
    environment = clean_environment("MAKE", "MFLAGS")  # tests run under make themselves, with options of its own
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return [" ".join(line.split()) for line in done.stdout.splitlines() if not line.startswith("#")]


def image_problems(text: str) -> list[str]:
    """What is wrong with the file beyond what a linter can know."""
    found, problems = stages(text), list[str]()
    for stage, instructions in found.items():
        for source in (name for kind, files in instructions if kind == "COPY" for name in files.split()[:-1]):
            if not files_exist(found, stage, source):
                problems.append(f"{stage}: {source} is not here")
        parent = instructions[0][1].split()[0].replace("${VARIANT}", "cuda")
        if parent not in found and not re.search(r":v?\d+\.\d+\.\d+", parent):
            problems.append(f"{stage}: {parent} is not pinned")
    for stage in ("vllm", "image"):
        if [value for kind, value in found[stage] if kind == "USER"] != ["1000:100"]:
            problems.append(f"{stage}: does not run as 1000:100")
        packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
        copied = " ".join(value for kind, value in found[stage] if kind == "COPY").split()
        problems += [f"{stage}: lacks {name}" for name in packages["include"] if name.rstrip("*") not in copied]
    for variant in ("cpu", "cuda"):
        problems += [
            f"{kind}-{variant} is no stage" for kind in ("system", "packages") if f"{kind}-{variant}" not in found
        ]
    installs = [step for kind, run in found["packages"] if kind == "RUN" for step in run.split(" && ")]
    ours = [step for step in installs if "tomllib" not in step]
    venv, _, install, _, compiled, *_ = made()
    expected = [venv, install.removesuffix("--editable '.[demo]'"), f"{compiled} || true"]
    problems += [
        f"make runs {theirs!r}, the image {step!r}"
        for theirs, step in zip(expected, ours, strict=True)
        if not step.startswith(theirs)
    ]
    return problems


def files_exist(found: Stages, stage: str, source: str) -> bool:
    """Whether COPY finds it: in the repository, or made by an earlier stage."""
    earlier = list(found)[: list(found).index(stage)]
    return source.removeprefix("--from=") in earlier or source.startswith("/home/ray/lora/") or (ROOT / source).exists()


def lint(text: str) -> str:
    hadolint = Path(sys.executable).with_name("hadolint")
    return subprocess.run([hadolint, "--no-color", "-"], input=text, capture_output=True, text=True, check=False).stdout


def test_the_image_is_built_as_make_installs() -> None:
    assert lint(DOCKERFILE) == ""
    assert image_problems(DOCKERFILE) == []
    assert f"ray=={importlib.metadata.version('ray')}\n" in (ROOT / "constraints.txt").read_text()


FAULTS = {
    "a path that is not here": ("COPY jobs jobs", "COPY job jobs", "job is not here"),
    "a package that is left out": ("COPY cluster cluster\n", "", "lacks cluster"),
    "root": ("USER 1000:100", "USER root", "does not run as 1000:100"),
    "an option that make has not": (" --no-compile", "", "make runs"),
    "a variant without system": ("AS system-cpu", "AS system-x86", "system-cpu is no stage"),
    "an image that is not pinned": ("python:3.11.14-slim-bookworm", "python:3.11-slim", "is not pinned"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_image_is_seen(fault: str) -> None:
    there, instead, complaint = FAULTS[fault]
    assert there in DOCKERFILE
    problems = image_problems(DOCKERFILE.replace(there, instead))
    assert any(complaint in problem for problem in problems), problems


def test_the_linter_sees_faults() -> None:
    assert shutil.which("hadolint", path=Path(sys.executable).parent)
    assert "DL3009" in lint(DOCKERFILE.replace("    && rm -rf /var/lib/apt/lists/* \\\n", ""))

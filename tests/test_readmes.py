"""What the READMEs say is there: files and headings that they link to, commands, settings, and a job's options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from cluster.settings import PREFIX, Settings
from jobs.spec import JobSpec, load_spec

ROOT = Path(__file__).parents[1]
FOLDERS = ("cluster", "deploy", "jobs", "k8s", "lora_core", "tests")
READMES = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
every_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(readme: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", readme.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_readme
def test_links_lead_somewhere(readme: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", FENCED.sub("", readme.read_text())):
        path, _, anchor = link.partition("#")
        target = readme.parent / path if path else readme
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(r"`([\w./]+/[\w.]+\.(?:py|yaml))`", readme.read_text()):
        assert (ROOT / path).exists() or (readme.parent / path).exists(), path


@every_readme
def test_commands_and_settings_exist(readme: Path) -> None:
    text, makefile = readme.read_text(), (ROOT / "Makefile").read_text()
    code = re.findall(r"`[^`]+`", FENCED.sub("", text)) + re.findall(r"^make .*$", text, re.MULTILINE)
    for target in re.findall(r"\bmake (\.?[a-z/]+)\b", " ".join(code)):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
    for module in re.findall(r"python -m ([\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for name in re.findall(rf"\b{PREFIX}([A-Z_]+[A-Z])\b", text):
        assert name.lower() in Settings.model_fields, name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_the_example_job_is_the_one_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "job.yaml").write_text(shown)
    job = load_spec(tmp_path / "job.yaml").model_dump(exclude={"train"})
    assert job == load_spec(Path("jobs/examples/triage.yaml")).model_dump(exclude={"train"})


def options(model: type[BaseModel], prefix: str = "") -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Each option of a job by its dotted name: its default, and the words that it takes, where it takes no others."""
    found: dict[str, tuple[Any, tuple[str, ...]]] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= options(field.annotation, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else field.get_default(call_default_factory=True)
        words = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        found[prefix + name] = default, tuple(word for word in words if isinstance(word, str))
    return found


def test_the_options_of_a_job_are_those_that_there_are() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.*)\|$", (ROOT / "jobs/README.md").read_text(), re.MULTILINE)
    table = {option: (yaml.safe_load(default.strip("`")), text + default) for option, default, text in rows}
    expected = options(JobSpec)
    assert {option: default for option, (default, _) in table.items()} == {
        option: default for option, (default, _) in expected.items()
    }
    for option, (_, words) in expected.items():
        assert all(f"`{word}`" in table[option][1] for word in words), option

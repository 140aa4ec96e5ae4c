"""Who may import whom, read from the source: packages one way, in a package the rooms one way, no circles in a room."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The rooms of each package, folders and single files, in order: a room imports only what stands above it. In a room
# files are free to import each other, but not in a circle; no list says how they stand.
ORDER = {
    "lora_core": ["config", "lora", "adapters", "kernels", "data", "models", "training", "inference", "library"],
    "cluster": ["requirements", "log_format", "tracing", "settings", "metrics", "proxies", "storage", "sources",
     "aliases", "registry", "adapter_lifecycle", "ray_runtime", "embedded_ray"],
    "jobs": ["spec_text", "duration", "sweep", "spec", "job", "errors", "trials", "halving", "queue_snapshot",
     "admitted", "initial_adapter", "stored_examples", "admission", "store", "estimate", "job_log", "submission",
     "job_report", "screen", "follow", "published_adapters", "scheduling", "session", "demo", "adapter_commands",
     "job_commands", "__main__"],
    "deploy": ["serving", "vllm_plugin", "proxy", "api", "app", "examples", "__main__"],
}  # fmt: skip
MAY_IMPORT = {
    "lora_core": set(),
    "cluster": set(),
    "jobs": {"lora_core", "cluster"},
    "deploy": {"jobs", "lora_core", "cluster"},
}
# Libraries that a package never imports; a file's own entry comes on top of its package's.
FORBIDDEN = {
    "lora_core": {"ray", "boto3", "botocore", "fastapi", "starlette", "uvicorn", "httpx", "requests", "sqlalchemy"},
    "cluster": {"torch", "transformers", "safetensors", "fastapi", "sqlalchemy"},
    "jobs": {"fastapi", "starlette", "uvicorn"},
    "deploy": set(),
    "jobs.scheduling.policy": {"ray", "torch"},
    "jobs.halving": {"ray", "torch"},
    "jobs.spec": {"ray", "torch"},
}


def read_sources() -> dict[str, str]:
    """Dotted module name -> source, for every file of the four packages."""
    paths = [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in paths}


@cache
def imported_modules(source: str) -> set[str]:
    """Every module that a source imports, inside functions too; `from a import b` gives both `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def violations(sources: dict[str, str]) -> list[str]:
    """Every broken import rule, one sentence each."""
    of_files = [problem for module, source in sources.items() for problem in problems_of(module, source)]
    return of_files + circles(sources)


def problems_of(module: str, source: str) -> list[str]:
    """What is wrong with one file's place, and with what it imports."""
    problems = []
    package, room, *_ = parts = module.split(".")
    for name in sys.stdlib_module_names.intersection(parts):
        problems.append(f"{module}: hides the standard library's {name}, since Ray puts script folders on the path")
    if room not in (*ORDER[package], "__init__"):
        return [*problems, f"{module}: has no place in the order of {package}"]
    banned = FORBIDDEN[package] | FORBIDDEN.get(module, set())
    for target in sorted(imported_modules(source)):
        top, _, rest = target.partition(".")
        other = rest.partition(".")[0]
        if not top:
            problems.append(f"{module}: {target} is relative; write the package's name")
        elif top in banned:
            problems.append(f"{module}: may not import {top}")
        elif top in ORDER and top != package and top not in MAY_IMPORT[package]:
            problems.append(f"{module}: {package} may not import {top}")
        elif top == package and parts[-1] == "__init__":
            problems.append(f"{module}: imports {target}; every import below its folder would pay for it")
        elif top == package and other in ORDER[package][ORDER[package].index(room) + 1 :]:
            problems.append(f"{module}: {other} stands below it")
    return problems


def circles(sources: dict[str, str]) -> list[str]:
    """A circle of each room, and of each folder in one, whose files import each other in circles. A folder counts in
    the one that it is in as a file does.
    """
    graphs: dict[str, dict[str, set[str]]] = {}
    for module, source in sources.items():
        parts = module.split(".")
        for target in (name.split(".") for name in imported_modules(source)):
            shared = next((at for at, pair in enumerate(zip(parts, target, strict=False)) if len(set(pair)) > 1), None)
            if shared is not None and shared > 1:
                graph = graphs.setdefault(".".join(parts[:shared]), {})
                graph.setdefault(parts[shared], set()).add(target[shared])
    problems = []
    for folder, graph in graphs.items():
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            problems.append(f"{folder}: a circle of imports, {' <- '.join(error.args[1])}")
    return problems


def test_imports_follow_the_layout() -> None:
    assert violations(read_sources()) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("lora_core.data.packing", "import ray", "lora_core.data.packing: may not import ray"),
        ("lora_core.lora", "def f():\n    from boto3.session import Session", "lora_core.lora: may not import boto3"),
        ("lora_core.lora", "from cluster.settings import Settings", "lora_core.lora: lora_core may not import cluster"),
        ("lora_core.config", "from lora_core import models", "lora_core.config: models stands below it"),
        ("lora_core.data.files", "from lora_core.models.base import BaseModel", "lora_core.data.files: models stands"),
        ("lora_core.models.llama.head", "import lora_core.library", "lora_core.models.llama.head: library stands"),
        ("lora_core.models.base", "from .files import x", "lora_core.models.base: .files is relative"),
        ("lora_core.__init__", "from lora_core.config import LoraConfig",
         "lora_core.__init__: imports lora_core.config"),
        ("jobs.store.__init__", "from jobs.store.jobs import JobQueue", "jobs.store.__init__: imports jobs.store.jobs"),
        ("cluster.storage.base", "from cluster.storage.s3 import S3Storage", "cluster.storage: a circle of imports, "),
        ("lora_core.models.llama.head", "from lora_core.models.base import x",
         "lora_core.models: a circle of imports, "),
        ("jobs.store.database", "if True:\n    from jobs.store import jobs", "jobs.store: a circle of imports, "),
        ("cluster.storage.base", "import torch.nn", "cluster.storage.base: may not import torch"),
        ("cluster.sources", "import lora_core.lora", "cluster.sources: cluster may not import lora_core"),
        ("jobs.scheduling.policy", "if True:\n    import ray", "jobs.scheduling.policy: may not import ray"),
        ("jobs.spec", "from jobs.session.driver import run_session", "jobs.spec: session stands below it"),
        ("jobs.session.rank", "from deploy.app import app", "jobs.session.rank: jobs may not import deploy"),
        ("jobs.store.queue", "", "jobs.store.queue: hides the standard library's queue"),
        ("cluster.misc", "", "cluster.misc: has no place in the order of cluster"),
        ("lora_core.misc.trainer", "", "lora_core.misc.trainer: has no place in the order of lora_core"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_seen(module: str, line: str, complaint: str) -> None:
    sources = read_sources()
    sources[module] = f"{sources.get(module, '')}\n{line}\n"
    assert [problem for problem in violations(sources) if problem.startswith(complaint)]


HEAVY = ["ray", "torch", "transformers"]


@pytest.mark.parametrize(
    ("module", "loaded"),
    [
        ("jobs.spec", []),
        ("jobs.scheduling.policy", []),
        ("lora_core.config", []),
        ("jobs.session.__main__", ["ray"]),
    ],
)
def test_modules_load_no_heavier_packages_than_they_need(module: str, loaded: list[str]) -> None:
    """In a fresh interpreter, since what an import imports counts too: clients start at once, plans by the thousand,
    and a session's driver seconds sooner.
    """
    code = f"import sys, {module}; print(*sorted({set(HEAVY)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, loaded), done.stderr

"""Who may import whom, read from the source: packages one way, and in a package only what the layout lists above."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The layout, in order. From its own package a file imports only what stands above it here; a new file gets its place.
ORDER = {
    "lora_core": [
        "json_values",
        "config",
        "lora",
        "dropout",
        "transfer",
        "kernels",
        "messages",
        "prompts",
        "sharegpt",
        "dataset_format",
        "dataset_tables",
        "dataset_files",
        "dataset_encoding",
        "dataset",
        "encoded_datasets",
        "packing",
        "cpu_attention",
        "attention",
        "dora",
        "adapter",
        "targets",
        "exactness",
        "adapter_bank",
        "adapter_init",
        "checkpointing",
        "precision",
        "adapter_view",
        "decoder_head",
        "decoder_weights",
        "decoder",
        "base_checks",
        "base_files",
        "fastest_precision",
        "base_model",
        "peft_format",
        "merge",
        "fair_queue",
        "loss",
        "flat_adapter",
        "optim",
        "engine_job",
        "live_job",
        "ready_batch",
        "rehearsal",
        "footprint",
        "kernel_memory",
        "decoder_memory",
        "hook_memory",
        "memory",
        "room",
        "trainer",
        "library",
        "kv_cache",
        "sampling",
        "batching",
        "detokenizer",
        "generator",
    ],
    "cluster": [
        "settings",
        "metrics",
        "proxies",
        "storage_base",
        "storage_s3",
        "storage",
        "bases",
        "registry",
        "runtime",
    ],
    "jobs": [
        "spec_text",
        "spec",
        "job",
        "initial_adapter",
        "stored_examples",
        "admission",
        "database",
        "session_table",
        "job_queue",
        "job_report",
        "policy",
        "queue_metrics",
        "launcher",
        "scheduler",
        "orders",
        "job_reader",
        "held_job",
        "training_loop",
        "session",
        "demo",
        "__main__",
    ],
    "deploy": [
        "protocol",
        "ray_metrics",
        "decode_loop",
        "adapter_cache",
        "adapter_server",
        "api_requests",
        "chat_api",
        "jobs_api",
        "gateway",
        "app",
    ],
}
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
    "jobs.policy": {"ray", "torch"},
    "jobs.spec": {"ray", "torch"},
}


def read_sources() -> dict[str, str]:
    """Dotted module name -> source, for every file of the four packages; `jobs` alone is jobs/__init__.py."""
    sources = {}
    for package in ORDER:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


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
    problems = []
    for module, source in sources.items():
        package, _, inner = module.partition(".")
        file = inner.partition(".")[0]
        if file in sys.stdlib_module_names:
            problems.append(f"{module}: hides the standard library's {file}, since Ray puts script folders on the path")
        if file and file not in ORDER[package]:
            problems.append(f"{module}: has no place in the order of {package}")
            continue
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
            elif top == package and not file:
                problems.append(f"{module}: __init__.py imports {target}; every import of the package would pay for it")
            elif top == package and other in ORDER[package][ORDER[package].index(file) + 1 :]:
                problems.append(f"{module}: {other} stands below it")
    return problems


def test_imports_follow_the_layout() -> None:
    assert violations(read_sources()) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("lora_core.optim", "import ray", "lora_core.optim: may not import ray"),
        ("lora_core.loss", "def f():\n    from boto3.session import Session", "lora_core.loss: may not import boto3"),
        ("lora_core.lora", "from cluster.settings import Settings", "lora_core.lora: lora_core may not import cluster"),
        ("lora_core.config", "from lora_core import optim", "lora_core.config: optim stands below it"),
        ("lora_core.config", "from lora_core.trainer import TrainEngine", "lora_core.config: trainer stands below it"),
        ("lora_core.optim", "from .trainer import TrainEngine", "lora_core.optim: .trainer is relative"),
        ("lora_core", "from lora_core.config import LoraConfig", "lora_core: __init__.py imports lora_core.config"),
        ("cluster.storage", "import torch.nn", "cluster.storage: may not import torch"),
        ("cluster.storage", "import lora_core.lora", "cluster.storage: cluster may not import lora_core"),
        ("jobs.policy", "if True:\n    import ray", "jobs.policy: may not import ray"),
        ("jobs.spec", "from jobs.session import main", "jobs.spec: session stands below it"),
        ("jobs.session", "from deploy.app import app", "jobs.session: jobs may not import deploy"),
        ("jobs.queue", "", "jobs.queue: hides the standard library's queue"),
        ("cluster.misc", "", "cluster.misc: has no place in the order of cluster"),
    ],
)
def test_a_broken_rule_is_seen(module: str, line: str, complaint: str) -> None:
    source = read_sources().get(module, "") + f"\n{line}\n"
    assert [problem for problem in violations({module: source}) if problem.startswith(complaint)]


HEAVY = ["ray", "torch", "transformers"]


@pytest.mark.parametrize(
    ("module", "loaded"),
    [("jobs.spec", []), ("jobs.policy", []), ("lora_core.config", []), ("jobs.session", ["ray", "torch"])],
)
def test_modules_load_no_heavier_packages_than_they_need(module: str, loaded: list[str]) -> None:
    """In a fresh interpreter, since what an import imports counts too: clients start at once, plans by the thousand,
    and a session's driver seconds sooner.
    """
    code = f"import sys, {module}; print(*sorted({set(HEAVY)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, loaded), done.stderr

"""How much memory two processes need that load the same base: `python -m tests.bench.shared_base [source] [precision]`.

Each process loads the base, runs a forward pass so that every weight is touched, and waits. The kernel then says what
each accounts for: PSS counts a page that n processes share as 1/n of a page. Required: the weights of both take at most
1.2 copies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.tiny_models import smollm2_gguf

ALLOWED_COPIES = 1.2


def main(source: str, precision: str) -> int:
    """0 where the weights of two processes account for at most 1.2 copies."""
    cache = Path(os.environ.get("LORA_TEST_CACHE") or tempfile.mkdtemp())
    command = [sys.executable, "-m", "tests.bench.shared_base", "--child", source, precision, str(cache)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        loaded = [json.loads(_line(process)) for process in processes]
        rows = [{"pid": process.pid, **_memory(process.pid)} for process in processes]
    finally:
        for process in processes:
            process.kill()
    one_copy = loaded[0]["nbytes"] / 2**20
    for row, before in zip(rows, (child["pss_before"] for child in loaded), strict=True):
        row["grown"] = row["total_pss"] - before
    copies = sum(row["weights_pss"] for row in rows) / one_copy
    mapped = (
        min(row["weights_rss"] for row in rows) / one_copy
    )  # a process that had copied the weights would not show here
    print(f"{source} in {loaded[0]['precision']}: one copy is {one_copy:.0f} MiB\n")
    columns = {"pid": "process", "total_pss": "PSS of all", "grown": "grown by loading"}
    columns |= {"weights_rss": "RSS of weights", "weights_pss": "PSS of weights"}
    print("".join(f"{title:>18}" for title in columns.values()) + "  (MiB)")
    for row in rows:
        print("".join(f"{row[name]:>18.0f}" for name in columns))
    print(
        f"\nthe weights of both: {copies:.2f} copies (at most {ALLOWED_COPIES}), {mapped:.0%} of them mapped in each\n"
    )
    good = copies <= ALLOWED_COPIES and mapped > 0.95
    figures = {"copies": round(copies, 3), "mapped": round(mapped, 3), "one_copy_mib": round(one_copy, 1)}
    totals = {name: round(sum(row[name] for row in rows), 1) for name in ("total_pss", "grown", "weights_pss")}
    print(json.dumps({"bench": "shared_base", "precision": loaded[0]["precision"], **figures, **totals, "good": good}))
    return 0 if good else 1


def child(source: str, precision: str, cache: str) -> None:
    """Load, touch, say so, and wait for the end."""
    import torch

    from lora_core.models.attention import PackedAttention
    from lora_core.models.base import load_base

    before = _memory(os.getpid())["total_pss"]
    base = load_base(source, precision=precision, cache_dir=Path(cache), device=torch.device("cpu"))  # type: ignore[arg-type]
    with torch.no_grad():
        ids = torch.arange(8)[None]
        base.head(base.hidden(ids, ids, PackedAttention([8])))
    print(json.dumps({"nbytes": base.nbytes, "precision": base.precision, "pss_before": before}), flush=True)
    sys.stdin.read()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _memory(pid: int) -> dict[str, float]:
    """MiB: PSS of the whole process, and RSS and PSS of the safetensors that it maps."""
    found = {"total_pss": 0.0, "weights_pss": 0.0, "weights_rss": 0.0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            found["total_pss"] = int(line.split()[1]) / 1024
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        field = line.split()[0]
        if not field.endswith(":"):  # the head of a mapping
            inside = line.endswith(".safetensors")
        elif inside and field in ("Pss:", "Rss:"):
            found[f"weights_{field[:-1].lower()}"] += int(line.split()[1]) / 1024
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        arguments = sys.argv[1:] or [smollm2_gguf()]
        sys.exit(main(arguments[0], arguments[1] if len(arguments) > 1 else "auto"))

"""`make demo`: one job from submission to chat, on this machine, through the same commands that a user would type.

python -m jobs submit jobs/examples/triage.yaml
serve run deploy.app:app
60 held-out tickets, to the base and to the adapter; then one question to both
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.embedded_ray import find_embedded, record_process
from cluster.proxies import reach_this_machine_directly
from cluster.ray_runtime import WHICH_RAY, NoClusterError
from cluster.settings import Settings, load_settings

EXAMPLES = Path(__file__).resolve().parent / "examples"
BASE, ADAPTER = "smollm2-135m", "smollm2-135m:triage"
LONGEST = 20  # the held-out answers have 18 tokens and an end; the base would go on for ever
QUESTION = (
    "Hi, I was charged twice for my Pawtrail subscription this month and I need the money back today, my rent is due!"
)


def main() -> int:
    """Run the whole journey; returns the exit code."""
    settings = load_settings()
    reach_this_machine_directly()
    for name in WHICH_RAY:
        if address := os.environ.pop(name, ""):
            print(f"{name}={address} is left out of account: the demo has a Ray of its own on this machine")
    began = time.monotonic()
    print("$ python -m jobs submit jobs/examples/triage.yaml", flush=True)
    submitted = subprocess.run([sys.executable, "-m", "jobs", "submit", str(EXAMPLES / "triage.yaml")], check=False)
    if submitted.returncode != 0:
        return submitted.returncode
    print("\n$ serve run deploy.app:app", flush=True)
    url = served(settings)
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    rows = [json.loads(line) for line in (EXAMPLES / "triage_heldout.jsonl").read_text().splitlines()]
    for title, model in (("before (base)", BASE), ("after (adapter)", ADAPTER)):
        score = sum(_answers(client, model, rows))
        print(
            f"exact match on {len(rows)} held-out tickets, {title}: {score}/{len(rows)} = {score / len(rows):.0%}",
            flush=True,
        )
    print(f"\n> {QUESTION}")
    messages = [*rows[0]["messages"][:-2], {"role": "user", "content": QUESTION}]
    for model in (BASE, ADAPTER):
        print(f"{model:>22}: {_ask(client, model, messages, max_tokens=64)}")
    print(f"\ndone in {time.monotonic() - began:.0f} s; the server answers at {url}/v1 until `make stop`")
    return 0


def _answers(client: Any, model: str, rows: list[dict[str, Any]]) -> list[bool]:
    """Return whether each row's answer is, to the letter, the one that was held out."""

    def right(row: dict[str, Any]) -> bool:
        *prompt, answer = row["messages"]
        return _ask(client, model, prompt, max_tokens=LONGEST) == str(answer["content"]).strip()

    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(right, rows))


def _ask(client: Any, model: str, messages: list[dict[str, str]], max_tokens: int) -> str:
    completion = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=max_tokens)
    return (completion.choices[0].message.content or "").strip()


def served(settings: Settings, timeout: float = 120.0) -> str:
    """Return the address of the Serve application, which is started unless it answers already."""
    url = f"http://127.0.0.1:{settings.serve_port}"
    if _healthy(url):
        return url
    deadline = time.monotonic() + timeout
    while (embedded := find_embedded(settings)) is None:  # a job that was there already has only just called for a Ray
        if time.monotonic() > deadline:
            raise NoClusterError("Ray did not come up; look into logs/scheduler.log below LORA_HOME")
        time.sleep(0.2)
    logs = settings.home / "logs"
    serve = str(Path(sys.executable).parent / "serve")
    environment = {**os.environ, **embedded.environment}
    with (logs / "serve.log").open("ab") as output:
        start = [serve, "start", "--http-port", str(settings.serve_port)]
        subprocess.run(start, env=environment, stdout=output, stderr=output, check=True)
        process = subprocess.Popen(
            [serve, "run", "deploy.app:app"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    record_process(settings, "serve", process.pid)
    while not _healthy(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise NoClusterError(f"the server did not come up; look into {logs / 'serve.log'}")
        time.sleep(0.3)
    return url


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=2) as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m tests.support.serve_app PORT FOLDER`: the Serve application on a Ray of its own, until its input closes.

Prints one line of JSON when it answers: the port of Ray's metrics. `running_app` starts it for others.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.ray_runtime import SERVE_TRANSPORT
from tests.support.machine import clean_environment, free_port

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 60.0


@dataclass(frozen=True)
class ServeApp:
    """A running application."""

    port: int
    metrics_port: int
    pid: int


@contextlib.contextmanager
def running_app(home: Path, bases: Mapping[str, Path], environment: Mapping[str, str]) -> Iterator[ServeApp]:
    """The application on these bases, with this LORA_HOME, in which `serve.log` is its log; `environment` are more
    variables.

    Raises:
        RuntimeError: it does not come up; with its log.
    """
    port = free_port()
    variables = clean_environment("AWS_") | {
        "LORA_HOME": str(home),
        "LORA_BASE_MODELS": json.dumps({name: str(folder) for name, folder in bases.items()}),
        "RAY_AUTH_MODE": "disabled",  # or Ray would make a token in this user's home
        "HF_HUB_OFFLINE": "1",
        **SERVE_TRANSPORT,
        **environment,
    }
    log = home / "serve.log"
    # The path of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="lora-ray-", dir="/tmp") as folder, log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.serve_app", str(port), folder],
            cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(log.read_text())
            yield ServeApp(port, json.loads(line)["metrics_port"], process.pid)
        finally:
            process.stdin.close()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def main(port: int, folder: str) -> None:
    import ray
    from ray import serve

    from deploy.app import app  # reads LORA_* and must do so before Ray is there, as in `serve run`

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=128 * 2**20,
        log_to_driver=False,
        _temp_dir=folder,
        _node_ip_address="127.0.0.1",
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app)
    print(json.dumps({"metrics_port": ray.nodes()[0]["MetricsExportPort"]}), flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

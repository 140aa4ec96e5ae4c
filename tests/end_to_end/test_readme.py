"""The READMEs are executed: the commands of `jobs/README.md` run as they stand, on a Ray cluster of their own with a
bucket on a real S3 server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.registry import AdapterRegistry
from cluster.storage.directory import open_storage
from tests.support.machine import clean_environment, free_port
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster(tmp_path: Path, s3_server: S3Server) -> Iterator[dict[str, str]]:
    """The environment of a shell that has the README's cluster to itself: ports, folders and a bucket of its own."""
    gcs, api, serve = free_port(), free_port(), free_port()
    environment = {
        **clean_environment(),
        **s3_server.environment,
        "LORA_HOME": str(tmp_path / "home"),
        "SERVE_PORT": str(serve),
        "RAY_AUTH_MODE": "disabled",
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{api}",
        "RAY_TMPDIR": f"/tmp/lora-readme-{os.getpid()}",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "START_OPTIONS": f"--port={gcs} --dashboard-port={api} --node-ip-address=127.0.0.1",
    }
    Path(environment["RAY_TMPDIR"]).mkdir(exist_ok=True)
    yield environment
    ours = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == environment["RAY_TMPDIR"]:
                ours.append(process)
                process.terminate()
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    for process in psutil.wait_procs(ours, timeout=5)[1]:
        process.kill()
    shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


def test_the_journey_on_a_ray_cluster_runs_as_it_is_written(
    cluster: dict[str, str], s3_environment: S3Server, shared_cache: Path, tmp_path: Path
) -> None:
    """With a quarter of the rows, one epoch instead of three, and the base converted already."""
    cache, bases, job = Path(cluster["LORA_HOME"]) / "cache", shared_cache / "bases", tmp_path / "tone.yaml"
    cache.mkdir(parents=True)
    bases.mkdir(exist_ok=True)
    (cache / "bases").symlink_to(bases)
    written, rows = (ROOT / "jobs/examples/tone.yaml").read_text(), tmp_path / "tone.jsonl"
    rows.write_text("\n".join((ROOT / "jobs/examples/tone.jsonl").read_text().splitlines()[:16]))
    for shown, here in (("epochs: 3", "epochs: 1"), ("jobs/examples/tone.jsonl", str(rows))):
        assert shown in written
        written = written.replace(shown, here)
    job.write_text(written)
    url = f"s3://{s3_environment.bucket}/readme"
    (script,) = re.findall(r"```bash\n(.*?)```", (ROOT / "jobs/README.md").read_text(), re.DOTALL)
    for shown, here in (
        ("source .venv/bin/activate\n", ""),
        ("s3://my-bucket/lora", url),
        ("jobs/examples/tone.yaml", str(job)),
        ("ray start --head ", f"ray start --head {cluster['START_OPTIONS']} "),
        ("serve run", f"serve start --http-port {cluster['SERVE_PORT']}\nserve run"),
        ("127.0.0.1:8000", f"127.0.0.1:{cluster['SERVE_PORT']}"),
    ):
        assert shown in script
        script = script.replace(shown, here)
    transcript = tmp_path / "output.txt"  # a file: the server in the background would keep a pipe open
    with transcript.open("w") as out:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=ROOT,
            env=cluster,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        shell.wait(timeout=400)
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
    output = transcript.read_text()
    assert shell.returncode == 0, output
    assert 'model="smollm2-135m:tone"' in output
    answer, _ = json.JSONDecoder().raw_decode(output[output.index('{"id"') :])
    assert answer["choices"][0]["message"]["content"].strip()
    assert re.search(r"job-\w+ +succeeded", output)
    assert AdapterRegistry(open_storage(url)).resolve("smollm2-135m", "tone").manifest["base_fingerprint"]

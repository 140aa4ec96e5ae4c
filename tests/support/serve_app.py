"""`python -m tests.support.serve_app PORT FOLDER`: the Serve application on a Ray of its own, until its input closes.

Prints one line of JSON when it answers: the port of Ray's metrics.
"""

from __future__ import annotations

import json
import sys

import ray
from ray import serve


def main(port: int, folder: str) -> None:
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

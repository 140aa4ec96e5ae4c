"""Starts the driver of a session.

python -m jobs.session --id session-1a2b3c4d --fence 1        (the scheduler starts it, as a Ray job)
"""

from __future__ import annotations

import argparse
import os

import ray

from cluster.proxies import reach_this_machine_directly
from cluster.ray_runtime import log_to_stderr, use_own_ray
from cluster.settings import load_settings
from jobs.session.driver import run_session


def main() -> None:
    """Run the Ray job."""
    parser = argparse.ArgumentParser(prog="python -m jobs.session")
    parser.add_argument("--id", required=True)
    parser.add_argument("--fence", type=int, required=True)
    arguments = parser.parse_args()
    settings = load_settings()
    log_to_stderr(settings.log_format)
    reach_this_machine_directly()
    use_own_ray()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a dead rank is noticed in half a second
    # For actors too: Train's clean-up asks for the address anew, and gives up where it finds two Rays.
    ray.init(log_to_driver=True, runtime_env={"env_vars": {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]}})
    raise SystemExit(run_session(settings, arguments.id, arguments.fence))


if __name__ == "__main__":
    main()

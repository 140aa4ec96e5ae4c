"""Proxies of the environment are for the world outside: none stands between the processes of one machine.

With HTTP_PROXY set and NO_PROXY not, requests, httpx, urllib and botocore would ask the proxy for 127.0.0.1, too.
"""

from __future__ import annotations

import os
from urllib.request import getproxies_environment

import psutil

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def reach_this_machine_directly() -> None:
    """Except this machine's addresses from the environment's proxies, here and in processes started from here."""
    excepted = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host for host in excepted.replace(",", " ").split() if host]
    # Without proxies the exceptions would be all that is set, and hide those of a system that keeps them elsewhere.
    if not getproxies_environment().keys() - {"no"} or "*" in hosts:
        return
    hosts = list(dict.fromkeys([*hosts, *LOOPBACK, *_addresses()]))
    # Both spellings: some clients read the one first and some the other.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)


def _addresses() -> list[str]:
    """Return those of this machine's interfaces, which Ray prefers to loopback; no link-local ones."""
    found = {address.address for interface in psutil.net_if_addrs().values() for address in interface
             if address.family.name in ("AF_INET", "AF_INET6")}  # fmt: skip
    return sorted(address for address in found if "%" not in address)

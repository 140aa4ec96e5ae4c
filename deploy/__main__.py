"""The command line of who serves: `python -m deploy keys create | list | revoke`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable

from cluster.settings import Settings, SettingsError, load_settings
from jobs.errors import JobError
from jobs.screen import print_json
from jobs.store.api_keys import KeyTable, Scope
from jobs.store.database import Database

LIMITS = {
    "requests-per-minute": "requests that it may make",
    "tokens-per-minute": "tokens, read and written, that it may use",
    "running-jobs": "jobs that may be unfinished at a time",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is printed in words, without a traceback."""
    chosen = _parser().parse_args(arguments)
    try:
        settings = load_settings()
        with contextlib.closing(Database(settings.database_url)) as database:
            command: Callable[[Settings, KeyTable, argparse.Namespace], None] = chosen.command
            command(settings, KeyTable(database), chosen)
    except (SettingsError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy", description="The API of the LoRA service.")
    rooms = parser.add_subparsers(required=True, metavar="COMMAND")
    keys = rooms.add_parser("keys", help="API keys: with the first one, the service answers nobody without one")
    commands = keys.add_subparsers(required=True, metavar="COMMAND")

    create = commands.add_parser("create", help="make a key, and print its secret, which nothing shows again")
    create.add_argument("--tenant", help="whose files, jobs and adapters it is for (LORA_TENANT)")
    create.add_argument("--name", default="", help="what you want to know it by")
    create.add_argument(
        "--scope",
        dest="scopes",
        action="append",
        choices=[scope.value for scope in Scope],
        help="what it is for, several times for several; train and infer where none is given",
    )
    for limit, text in LIMITS.items():
        create.add_argument(f"--{limit}", type=_positive, metavar="N", help=f"{text}; without it, any number")
    create.set_defaults(command=_create)

    listed = commands.add_parser("list", help="all keys, without their secrets")
    listed.add_argument("--json", action="store_true", help="print JSON")
    listed.set_defaults(command=_list)
    revoke = commands.add_parser("revoke", help="end a key for ever; in LORA_KEY_SECONDS it is refused")
    revoke.add_argument("key", help="the key's id, as create and list print it")
    revoke.set_defaults(command=_revoke)
    return parser


def _create(settings: Settings, keys: KeyTable, arguments: argparse.Namespace) -> None:
    scopes = frozenset(map(Scope, arguments.scopes or (Scope.TRAIN, Scope.INFER)))
    limits = {name: getattr(arguments, name) for name in (limit.replace("-", "_") for limit in LIMITS)}
    key, secret = keys.create(arguments.tenant or settings.tenant, scopes, name=arguments.name, **limits)
    print(f"{key.id} of tenant {key.tenant}; keep the secret, nothing shows it again:", file=sys.stderr)
    print(secret)


def _list(settings: Settings, keys: KeyTable, arguments: argparse.Namespace) -> None:
    if arguments.json:
        shown = [vars(key) | {"scopes": sorted(key.scopes)} for key in keys.list()]
        print_json([{name: value for name, value in key.items() if name != "sha256"} for key in shown])
        return
    for key in keys.list():
        limits = [
            f"{limit.replace('-', ' ')} {number}"
            for limit in LIMITS
            if (number := getattr(key, limit.replace("-", "_"))) is not None
        ]
        state = "revoked" if key.revoked_at is not None else ", ".join(limits) or "no limits"
        day = time.strftime("%Y-%m-%d", time.gmtime(key.created_at))
        print(f"{key.id}  {day}  {key.tenant}  {','.join(sorted(key.scopes))}  {state}  {key.name}".rstrip())


def _revoke(settings: Settings, keys: KeyTable, arguments: argparse.Namespace) -> None:
    key = keys.revoke(arguments.key)
    print(f"{key.id} of tenant {key.tenant} is revoked")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError("below 1")
    return number


if __name__ == "__main__":
    sys.exit(main())

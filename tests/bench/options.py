"""What the command lines of benches share, and what they say of the machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from tests.bench.peers import SHAPES
from tests.bench.report import Conditions


def bench_parser(description: str | None, tokens: int, of: str) -> argparse.ArgumentParser:
    """The options of a bench in the shape of a Llama; `tokens` are `of` something."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--tokens", type=int, default=tokens, help=of)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the program out")
    return parser


def some_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """The type of an option that takes some of these words, by commas."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := sorted(set(chosen) - set(known)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(known)}")
        return chosen

    return parse


def conditions_of(arguments: argparse.Namespace, device: torch.device) -> Conditions:
    """Of what `bench_parser` takes."""
    return Conditions(arguments.shape, arguments.tokens, device, *((1, 3) if arguments.quick else (2, 7)))


def head_of(bench: str, arguments: argparse.Namespace, device: torch.device, ranks: int = 1) -> dict[str, object]:
    """What a bench's table and its line of JSON begin with."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {
        "bench": bench,
        "shape": arguments.shape,
        "tokens": arguments.tokens,
        "device": name if ranks == 1 else f"{ranks} x {name}",
        "torch": torch.__version__,
    }

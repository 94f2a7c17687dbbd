"""`xtoken cache-teacher`: its arguments, what it does, and what it says was lost."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from xtoken_jax.cli.tokenizers import print_json
from xtoken_jax.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from xtoken_jax.run.cache_teacher import Summary

TEXT = "run a teacher once over the training text, to train from its outputs without it"
HELP = """\
arguments are the key=value pairs of `xtoken distill`; the teacher, the data and the mesh are read:

  xtoken cache-teacher experiment=quickstart --out caches/quickstart --top-k 64
  xtoken distill       experiment=quickstart teacher.cache=caches/quickstart

Of each distribution the --top-k likeliest tokens are kept (of those, with --top-p, only as many as make
that mass), the token that comes, and how much mass all others have, which training spreads over them evenly.
--top-k all keeps everything. The same command again goes on where one was interrupted. Training refuses a
cache of another teacher, tokenizer, text, of other lengths of rows, or of another loss.temperature.
With hosts=auto, or hosts.coordinator, .count and .index, several processes share the work as in training.
"""
GOES_ON = "the same command goes on behind the last shard"
_TOP_P_BOUND = 1024  # tokens a distribution, where --top-p alone is given


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The command's own."""
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    sub.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder to write, or to go on with"
    )
    sub.add_argument("--top-k", metavar="K", help="tokens kept of a distribution, or all (default: 64)")
    sub.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help=f"fewer where they make this mass; without --top-k at most {_TOP_P_BOUND:,}",
    )
    sub.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        default="float16",
        help="of log-probabilities (default: float16, which rounds them an eighth as much as bfloat16)",
    )
    sub.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        metavar="T",
        help="that losses may have later (default: the experiment's, and 1)",
    )
    sub.add_argument(
        "--teacher", default="teacher", metavar="NAME", help="which, of several (default: the first)"
    )
    sub.add_argument("--json", action="store_true", help="print the figures as JSON on stdout")


def run(options: argparse.Namespace, console: Console) -> None:
    """Writes the cache, and says what it holds."""
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p {options.top_p}: must be above 0, and at most 1")
    top_k = _top_k(options.top_k, options.top_p)
    if bad := [t for t in options.temperatures or () if not 0 < t < float("inf")]:
        raise UserError(f"--temperatures {bad[0]}: must be above 0")

    from xtoken_jax.train.signals import StopSignals

    with StopSignals(GOES_ON):
        from xtoken_jax.distributed.processes import is_first, joined
        from xtoken_jax.run.experiment import load_experiment

        experiment = load_experiment(options.overrides)
        teachers = experiment.every_teacher()
        temperatures = {1.0, *(options.temperatures or ())}
        if options.teacher in teachers and not options.temperatures:
            temperatures.add(teachers[options.teacher].loss.temperature)
        with joined(experiment.hosts):  # before anything touches a device
            from xtoken_jax.run.cache_teacher import cache_teacher
            from xtoken_jax.teacher_cache.distributions import Keep

            console.quiet = not is_first()
            keep = Keep(top_k, options.top_p, options.dtype, tuple(sorted(temperatures)))
            summary = cache_teacher(experiment, options.teacher, keep, options.out, console)
    if summary is None:  # process 0 says it
        return
    if options.json:
        print_json(figures(summary))
    else:
        _show(summary, options, console)


def _top_k(given: str | None, top_p: float) -> int | None:
    if given is None:
        return 64 if top_p == 1 else _TOP_P_BOUND
    if given == "all":
        return None
    if not given.isascii() or not given.isdigit() or int(given) < 1:
        raise UserError(f"--top-k {given}: must be a number from 1 on, or all")
    return int(given)


def figures(summary: Summary) -> dict[str, object]:
    """The summary as plain values."""
    found = {name: value for name, value in asdict(summary).items() if name not in ("index", "lost")}
    found["bytes_per_token"] = summary.bytes / summary.tokens
    found["raw_bytes_per_token"] = summary.raw_bytes / summary.tokens
    return {**found, **summary.lost, "shards": len(summary.index.shards), "teacher": summary.index.figures}


def _show(summary: Summary, options: argparse.Namespace, console: Console) -> None:
    from rich.table import Table

    index, lost = summary.index, summary.lost
    keep = index.keep
    kept = f"top {keep['top_k']:,}" if keep["top_k"] else "all tokens"
    kept += f" up to a mass of {keep['top_p']:g}" if keep["top_p"] < 1 else ""
    table = Table(
        title=f"{kept} of {index.size:,}, {keep['dtype']}: {summary.tokens:,} positions", show_header=False
    )
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    token = summary.bytes / summary.tokens
    for name, value in (
        ("bytes a token", f"{token:,.1f}"),
        ("  before compression", f"{summary.raw_bytes / summary.tokens:,.1f}"),
        ("  of all logits in float32", f"{4 * index.size:,} ({4 * index.size / token:,.0f} x)"),
        ("mass that is not kept: mean", f"{lost['mean_mass']:.2e}"),
        ("  99th percentile", f"{lost['p99_mass']:.2e}"),
        ("KL from the teacher to what is read back: mean", f"{lost['mean_divergence']:.2e} nats"),
        ("  99th percentile", f"{lost['p99_divergence']:.2e} nats"),
        ("text's tokens that are among the likeliest kept", f"{lost['label_among_kept']:.2%}"),
        ("teacher's cross-entropy on the text", f"{lost['cross_entropy']:.4f} nats a token"),
    ):
        table.add_row(name, value)
    console.print(table)
    key = "teacher.cache" if options.teacher == "teacher" else f"teachers.{options.teacher}.cache"
    speed = f", {summary.tokens_per_second:,.0f} tokens/s" if summary.tokens_per_second else ""
    console.print(
        f"cache    {options.out}   ({len(index.shards)} shards, {summary.bytes / 2**20:,.1f} MiB{speed})"
    )
    console.print(f"next     xtoken distill ... {key}={options.out}", markup=False)

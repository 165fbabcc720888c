"""The command line of the benchmark.

python -m fedhpc.bench [--repeats 5] [--quick] [--json]           all ratios that need only this machine
python -m fedhpc.bench --peers DIR [--environment DIR] [...]      whole programs: fedhpc and its peers
python -m fedhpc.bench --scale [--quick] [--json]                 how a round grows with ranks, cohort and population
python -m fedhpc.bench --private [--quick] [--json]               steps of DP-SGD, beside plain ones and Opacus
python -m fedhpc.bench --secure [--quick] [--json]                a client's part of secure aggregation, beside Flower's
python -m fedhpc.bench --robust [--quick] [--json]                robust rules, beside ByzFL
python -m fedhpc.bench --startup [--repeats 5] [--json]           ranks of two nodes, started each or forked
python -m fedhpc.bench --sweep [--repeats 1] [--json]             a sweep of runs together, or stopped early
python -m fedhpc.bench --sharding [--repeats 3] [--quick] [--json]    steps on a base that two ranks hold between them
python -m fedhpc.bench --gpu [--minutes 12] [--only PART,...] [--quick | --rehearsal] [--json]    blocks on a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedhpc.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the figures; returns 1 where something failed, after one line that says what."""
    parser = argparse.ArgumentParser(prog="fedhpc bench", description="speed ratios of fedhpc")
    parser.add_argument("--repeats", type=int, help="interleaved repeats; medians are shown (5; of programs 3)")
    parser.add_argument("--quick", action="store_true", help="the small models alone, and 3 repeats (of programs 1)")
    parser.add_argument("--only", default="", help="with --peers workloads, as 'W1 small,W3'; with --gpu parts")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder of the peers' harness")
    parser.add_argument(
        "--environment", type=Path, metavar="DIR", help="virtual environment of pfl (FB_VENVS/venv-pfl)"
    )
    parser.add_argument("--scale", action="store_true", help="rounds against ranks, cohort and population instead")
    parser.add_argument("--secure", action="store_true", help="a client's part of secure aggregation instead")
    parser.add_argument("--private", action="store_true", help="steps with privacy of single examples instead")
    parser.add_argument("--robust", action="store_true", help="rules that withstand wrong updates instead")
    parser.add_argument("--startup", action="store_true", help="what it costs to start ranks instead")
    parser.add_argument("--sweep", action="store_true", help="a sweep of runs together, or stopped early, instead")
    parser.add_argument("--sharding", action="store_true", help="steps on a base that two ranks hold instead")
    parser.add_argument("--gpu", action="store_true", help="blocks and runs on this machine's GPU instead")
    parser.add_argument("--minutes", type=float, help="with --gpu: for how long it is there (12); parts end in time")
    parser.add_argument("--rehearsal", action="store_true", help="with --gpu: all parts on the CPU with tiny models")
    parser.add_argument(
        "--json", action="store_true", help="JSON instead of a table, with --scale and --gpu one object per row"
    )
    options = parser.parse_args(arguments)
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least one is needed")
    others = ("scale", "peers", "private", "secure", "robust", "startup", "sweep", "sharding", "gpu")
    if sum(bool(getattr(options, name)) for name in others) > 1:
        names = [f"--{name}" for name in others]
        parser.error(f"{', '.join(names[:-1])} and {names[-1]} are different measurements: run one at a time")
    if options.only and not (options.peers or options.gpu):
        parser.error("--only chooses workloads of --peers or parts of --gpu")
    if (options.minutes is not None or options.rehearsal) and not options.gpu:
        parser.error("--minutes and --rehearsal belong to --gpu")
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: more than 0 are needed")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler says on stderr that it begins and ends
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGINT, interrupted)
    try:
        return measure(options)
    except UserError as error:
        print(f"fedhpc: error: {error}", file=sys.stderr)
        return 1


class EndedError(UserError):
    """The benchmark was asked to end, by SIGTERM or ^C."""


def interrupted(number: int, _: object) -> None:
    """Handle SIGTERM and ^C: raise EndedError, so that every program that was started is ended too."""
    raise EndedError(f"ended by {signal.Signals(number).name}")


def measure(options: argparse.Namespace) -> int:
    """Print the rows that the command line asks for, each as soon as it is there; returns the exit code."""
    if options.scale:
        from fedhpc.bench import scale

        for number, row in enumerate(scale.scale(options.quick)):
            print(json.dumps(row) if options.json else scale.markdown(row, heading=number == 0), flush=True)
        return 0
    from fedhpc.bench import table

    if options.peers:
        from fedhpc.bench import peers

        environment = options.environment or Path(os.environ.get("FB_VENVS", ".")) / "venv-pfl"
        parts = peers.parts(options.peers, environment, options.repeats or (1 if options.quick else 3), options.only)
    elif options.gpu:
        from fedhpc.bench import gpu

        parts = gpu.parts(
            options.only, options.quick, options.repeats or 3, options.minutes or gpu.MINUTES, options.rehearsal
        )
    elif options.secure:
        from fedhpc.bench import secure

        parts = secure.parts(options.repeats or 5, options.quick)
    elif options.robust:
        from fedhpc.bench import robust

        parts = robust.parts(options.repeats or 3, options.quick)
    elif options.startup:
        from fedhpc.bench import startup

        parts = startup.parts(options.repeats or 5)
    elif options.sweep:
        from fedhpc.bench import sweeps

        parts = sweeps.parts(options.repeats or 1)
    elif options.sharding:
        from fedhpc.bench import sharding

        parts = sharding.parts(options.repeats or 3, options.quick)
    elif options.private:
        from fedhpc.bench import private

        parts = private.parts(options.repeats or (3 if options.quick else 5), options.quick)
    else:
        from fedhpc.bench import compute, embedding, rounds

        repeats = options.repeats or (3 if options.quick else 5)
        parts = [
            *compute.parts(repeats, options.quick),
            *rounds.parts(repeats, options.quick),
            *embedding.parts(repeats),
        ]
    if not options.json:
        print(", ".join(f"{name} {value}" for name, value in machine().items()) + f"\n\n{table.HEADING}", flush=True)
    elif options.gpu:
        print(json.dumps(machine()), flush=True)
    rows: list[table.Row] = []
    failures = 0
    for part in parts:  # each is shown at once; the others go on where one fails
        try:
            for figure in part():
                rows.append(figure)
                if options.gpu and options.json:  # at once: a borrowed GPU may be taken away before the end
                    print(json.dumps(figure.json()), flush=True)
                elif not options.json:
                    print(table.markdown(figure), flush=True)
        except EndedError:
            raise
        except UserError as error:
            print(f"fedhpc: error: {error}", file=sys.stderr, flush=True)
            failures += 1
    if options.json and not options.gpu:
        print(json.dumps({"machine": machine(), "rows": [row.json() for row in rows]}, indent=1))
    return 1 if failures else 0


def machine() -> dict[str, Any]:
    """The machine and the versions that the figures were measured with."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())

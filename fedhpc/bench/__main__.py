"""The command line of the bench.

python -m fedhpc.bench [--repeats 5] [--quick] [--json]           all ratios that need nothing but this machine
python -m fedhpc.bench --peers DIR [--environment DIR] [...]      fedhpc beside its peers, as whole programs
python -m fedhpc.bench --scale [--quick] [--json]                 a round against ranks, cohort and population
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
    """Measure and print; 1 where something failed, with one line that says what."""
    parser = argparse.ArgumentParser(prog="python -m fedhpc.bench", description="speed ratios of fedhpc")
    parser.add_argument("--repeats", type=int, help="interleaved repeats; medians are shown (5, of programs 3)")
    parser.add_argument("--quick", action="store_true", help="the small models alone, and 3 repeats (of programs 1)")
    parser.add_argument("--only", default="", help="with --peers: names of workloads, as 'W1 small,W3'")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder of the peers' harness")
    parser.add_argument(
        "--environment", type=Path, metavar="DIR", help="virtual environment of pfl (FB_VENVS/venv-pfl)"
    )
    parser.add_argument("--scale", action="store_true", help="rounds against ranks, cohort and population instead")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table, with --scale one object per row")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, interrupted)
    try:
        _measure(options)
    except UserError as error:
        print(f"fedhpc: error: {error}", file=sys.stderr)
        return 1
    return 0


def interrupted(*_: object) -> None:
    """What SIGTERM does: nothing that was started is left."""
    raise UserError("ended by SIGTERM")


def _measure(options: argparse.Namespace) -> None:
    if options.scale:
        from fedhpc.bench import scale

        for number, row in enumerate(scale.scale(options.quick)):
            print(json.dumps(row) if options.json else scale.markdown(row, heading=number == 0), flush=True)
        return
    from fedhpc.bench import table

    if options.peers:
        from fedhpc.bench import peers

        environment = options.environment or Path(os.environ.get("FB_VENVS", ".")) / "venv-pfl"
        rows = peers.rows(options.peers, environment, options.repeats or (1 if options.quick else 3), options.only)
    else:
        from fedhpc.bench import compute, rounds

        repeats = options.repeats or (3 if options.quick else 5)
        rows = [*compute.rows(repeats, options.quick), *rounds.rows(repeats, options.quick)]
    if options.json:
        print(json.dumps({"machine": machine(), "rows": [row.json() for row in rows]}, indent=1))
    else:
        print(", ".join(f"{name} {value}" for name, value in machine().items()) + "\n")
        print(table.markdown(rows))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
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

"""Tables and plots of one run, or a comparison of several.

    python -m fedhpc.report RUN [RUN ...] [--out DIR] [--baseline NAME] [--target-loss X] [--axis KEY ...]
                            [--html FILE]

RUN is a run directory or a results.h5, finished or not, or a folder of runs such as a sweep's. One run is reported into
RUN/report, a folder into RUN/comparison, several into ./comparison: Markdown, CSV and PNG. Runs that differ only in
their seed are one group, shown as mean ± half the width of the 95 % confidence interval of the mean (Student's t). What
the drawing of the test's items leaves open is an interval of its own. Groups with seeds in common are compared seed by
seed as well: what the seeds share, like the split of the data, drops out of the differences.

--html also writes all of it as one page that needs no network, with tables that sort: to send, to print, to read on a
phone.

--target-loss adds what each group spent until its validation loss was at most X, and a projection of its bytes to
slower links (report/costs.py). --axis, which can be given several times, adds test results along a configuration key:
a line for each set of runs that differ in it alone, and the changes from the reference, the value that most runs have.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fedhpc.errors import UserError
from fedhpc.report.compare import compare
from fedhpc.report.page import Page
from fedhpc.report.runs import load_runs
from fedhpc.report.single import report_run
from fedhpc.report.text import console


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="fedhpc report", description="Tables and plots of one run, or a comparison of several."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run directory, its results.h5, or a folder of runs"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where Markdown, CSV and PNG files go")
    parser.add_argument("--baseline", metavar="NAME", help="row that the others are compared with; the first one")
    parser.add_argument("--target-loss", type=float, metavar="X", help="what was spent to get to this validation loss")
    parser.add_argument("--axis", action="append", default=[], metavar="KEY", help="results along a configuration key")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also as one page that needs no network")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    page = Page(options.html, shlex.join(["fedhpc", "report", *given])) if options.html is not None else None
    screen = console()
    try:
        of_paths = [load_runs(path) for path in options.runs]
        runs = [run for of_path in of_paths for run in of_path]
        folder = options.runs[0] / "comparison" if len(of_paths) == 1 else Path("comparison")
        out = options.out or (runs[0].directory / "report" if len(runs) == 1 else folder)
        try:
            out.mkdir(parents=True, exist_ok=True)
            if page is not None:
                page.prepare()
            if len(runs) == 1 and options.target_loss is None:
                written = report_run(runs[0], out, screen, page)
            else:
                written = compare(runs, out, screen, options.baseline, options.target_loss, options.axis, page)
        except OSError as error:
            path, option = error.filename or out, "--html" if error.filename == str(options.html) else "--out"
            raise UserError(f"{path}: cannot be written: {error.strerror}; choose another {option}") from error
    except UserError as error:
        print(f"fedhpc report: error: {error}", file=sys.stderr)
        return 2
    for path in written:
        screen.print(f"wrote {path}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

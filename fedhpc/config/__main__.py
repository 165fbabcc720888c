"""`python -m fedhpc.config`: every key of the configuration, its default and what it means."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fedhpc.config.reference import reference
from fedhpc.config.schema import SECTIONS
from fedhpc.errors import nearest


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the keys of the sections that are named, of all where none is; the exit code."""
    parser = argparse.ArgumentParser(
        prog="fedhpc config",
        description="Every key of the configuration, its default and meaning.",
        epilog="The defaults are those of a configuration file. The embedded demo, which runs without a file, says "
        "some of the keys otherwise: fedhpc/default.yaml.",
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="print this section alone, such as server")
    sections = parser.parse_args(arguments).sections
    for section in sections:
        if section not in SECTIONS:
            known = nearest(section, list(SECTIONS))
            print(f"fedhpc config: error: there is no section '{section}'; {known}", file=sys.stderr)
            return 2
    print(reference(sections))
    return 0


if __name__ == "__main__":
    sys.exit(main())

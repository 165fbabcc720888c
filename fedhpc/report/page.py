"""A report as one HTML page that needs no network: tables that sort, plots as SVG, texts.

The page is the template page.html. Jinja escapes what it fills in: names and generated texts are text, never markup.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedhpc import __version__
from fedhpc.report.plots import Plot
from fedhpc.report.text import Grid, write_text

if TYPE_CHECKING:
    import jinja2
else:
    from fedhpc.lazy import lazy

    jinja2 = lazy("jinja2", extra="report")

# The sections of a report, in their order.
TITLES = (
    *("Results", "Robustness", "Clients", "Split of the data", "Bytes and time"),
    *("Texts", "Rounds and events", "Tables of the approach", "Runs"),
)
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Page:
    """Where a page goes, and the command that makes it."""

    path: Path
    command: str

    def prepare(self) -> None:
        """Make the folder that the page goes into. OSError, which names the page, where it cannot be written there."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.path))

    def write(self, title: str, sections: Sequence[Section]) -> Path:
        """Write the sections that have any content. Returns the path."""
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        shown = [section for section in sections if section.grids or section.plots]
        page = template.render(title=title, command=self.command, version=__version__, sections=shown)
        return write_text(self.path, page)


@dataclass(frozen=True)
class Section:
    """A part of a report: its tables, plots and notes."""

    title: str
    grids: Sequence[Grid] = ()
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()


def sections(
    grids: Mapping[str, Sequence[Grid]],
    plots: Mapping[str, Sequence[Plot]],
    notes: Mapping[str, Sequence[str]] | None = None,
) -> list[Section]:
    """The sections of a report from what each of TITLES has; tables without rows are left out."""
    return [
        Section(
            title,
            [grid for grid in grids.get(title, ()) if grid.rows],
            plots.get(title, ()),
            (notes or {}).get(title, ()),
        )
        for title in TITLES
    ]

"""The documentation as a site: it is built without a warning, its links lead somewhere, all comes with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedhpc.config.schema import SECTIONS
from tests.ranks import REPOSITORY


@pytest.mark.slow
def test_the_site(tmp_path: Path) -> None:
    """mkdocs itself checks the links and that each page has its place; --strict makes a warning an error."""
    build = ["-m", "mkdocs", "build", "--strict", "--config-file", "launch/site/mkdocs.yml"]
    built = subprocess.run(
        [sys.executable, *build, "--site-dir", str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text() for page in tmp_path.rglob("*.html")}
    loads = r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?(https?:|//)'
    assert [name for name, text in pages.items() if re.search(loads, text)] == []
    reference = pages["reference/configuration.html"]
    assert re.findall(r'<h2 id="(\w+)">', reference) == list(SECTIONS)
    assert (
        "default runs/&lt;name&gt;" in reference
        and "<code>cohort_size</code>" in reference
        and "server.aggregator: trimmed_mean" in reference
    )
    assert '<h2 id="open_run">' in pages["reference/python.html"]

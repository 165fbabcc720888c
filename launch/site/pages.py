"""What mkdocs builds the site from: the repository's pages where they lie, and two that are written from the code.

The site has the folders of the repository, so that a link between two pages is right in both. A file that is no page
(a configuration, a plot) is part of it where a page links to it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import fedhpc
from fedhpc import registry
from fedhpc.config.reference import MODE, Key, options
from fedhpc.config.schema import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "configs", "slurm")
_LINK = re.compile(r"\]\(([^)#:\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace what mkdocs has found in docs/ by the pages of the repository, by their paths in it."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in FOLDERS:
        pages += [*(ROOT / folder).rglob("*.md"), *(ROOT / folder).rglob("*.ipynb")]
    others: set[Path] = set()
    for page in pages:
        path = page.relative_to(ROOT).as_posix()
        text = page.read_text(encoding="utf-8")
        text = notebook(page.name, text) if page.suffix == ".ipynb" else text.replace(".ipynb)", ".md)")
        files.append(File.generated(config, path.replace(".ipynb", ".md"), content=text))
        others |= {target for link in _LINK.findall(text) if (target := (page.parent / link).resolve()).is_file()}
    for other in sorted(other for other in others if other.suffix != ".md"):
        files.append(File.generated(config, other.relative_to(ROOT).as_posix(), abs_src_path=str(other)))
    files.append(File.generated(config, "reference/configuration.md", content="\n".join(configuration())))
    files.append(File.generated(config, "reference/python.md", content="\n".join(python())))
    return files


def notebook(name: str, text: str) -> str:
    """A notebook as a page: its texts, its code, and a link to itself."""
    cells = json.loads(text)["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    code = [cell["cell_type"] == "code" for cell in cells]
    parts = [f"```python\n{text}\n```" if is_code else text for text, is_code in zip(texts, code, strict=True)]
    return "\n\n".join([*parts, f"This page is a notebook: [{name}]({name})."])


def configuration() -> Iterator[str]:
    """Every key of the configuration as a page."""
    yield "# Configuration\n"
    yield f"`{MODE.partition('  ')[0]}` stands beside the sections; its values are {MODE.partition('# ')[2]}."
    yield "`fedhpc config SECTION` prints the same as text. Defaults are those of a configuration file.\n"
    for section in SECTIONS:
        for part in options(section):
            if not part.choice:
                yield f"## {section}\n"
            else:
                yield f"### {section}.{part.key}: {part.choice}\n"
                yield plain(summary(registry.load(part.family, part.choice))) + "\n"
            yield from table(part.keys)


def table(keys: list[Key]) -> Iterator[str]:
    """A row for each key."""
    if keys:
        yield "| key | default | meaning |\n|---|---|---|"
    for key in keys:
        default = "" if key.default is None else "required" if key.default == "(required)" else f"`{key.default}`"
        yield f"| `{key.name}` | {default} | {plain(key.meaning)} |"
    yield ""


def python() -> Iterator[str]:
    """The names of `import fedhpc` as a page: functions with what they take, then classes."""
    yield "# Python\n"
    yield "Names of `import fedhpc`. What plugins derive from comes last: [adding a choice](../docs/extending.md).\n"
    values = {name: getattr(fedhpc, name) for name in fedhpc.__all__}
    for name, value in sorted(values.items(), key=lambda item: inspect.isclass(item[1])):
        yield f"## {name}\n"
        if inspect.isfunction(value):
            yield f"```python\nfedhpc.{signature(value)}\n```\n"
        yield plain(inspect.getdoc(value) or "") + "\n"
        if value is fedhpc.Run:
            yield "| of a run | what it is |\n|---|---|"
            public = {key: member for key, member in vars(value).items() if not key.startswith("_")}
            yield from (f"| `{key}` | {plain(summary(member))} |" for key, member in public.items())
            yield ""


def signature(function: Callable[..., object]) -> str:
    """A function with what it takes, a line for each."""
    taken = inspect.signature(function)
    lines = [function.__name__ + "(", *(f"    {parameter}," for parameter in taken.parameters.values())]
    text = "\n".join([*lines, f") -> {taken.return_annotation}"])
    return re.sub(r"(: )'([^']*)'", r"\1\2", text)  # annotations are texts


def summary(documented: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())


def plain(text: str) -> str:
    """A text of the code without meaning for Markdown."""
    return re.sub(r"([|*_\[])", r"\\\1", text).replace("<", "&lt;")

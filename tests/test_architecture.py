"""What holds for the package as a whole: who imports whom, what is never called, and that every choice is complete."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import fedhpc
from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.config.schema import SECTIONS
from fedhpc.registry import Section, flat_choices

PACKAGE = Path(fedhpc.__file__).parent
CHOOSING = {section: flat_choices(model) for section, model in SECTIONS.items()}
FAMILIES = sorted({family for keys in CHOOSING.values() for family in keys.values()} | {"metrics", "proposers"})
CHOICES = [(family, name) for family in FAMILIES for name in registry.names(family)]


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text())
    return found


def imported(module: str, only_at_run_time: bool = False) -> set[str]:
    """Dotted names that a module imports, inside functions too."""
    tree = modules()[module]
    skipped: set[ast.AST] = set()
    if only_at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                skipped |= {inner for child in node.body for inner in ast.walk(child)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0, f"{module}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules() else node.module for name in inner}
    return names


def graph(only_at_run_time: bool, group: Any = lambda name: name) -> dict[str, set[str]]:
    """module -> modules of the package that it imports, itself apart."""
    edges: dict[str, set[str]] = {}
    for module in modules():
        # The package's public names are bound on first use, and told to type checkers.
        at_run_time = only_at_run_time or module == "fedhpc"
        inside = {name for name in imported(module, at_run_time) if name in modules()}
        edges.setdefault(group(module), set()).update(group(name) for name in inside)
    return {name: targets - {name} for name, targets in edges.items()}


def cycle(edges: dict[str, set[str]]) -> list[str] | None:
    """A cycle of the graph, or None."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        found = next((c for target in sorted(edges.get(name, ())) if (c := search(target, [*path, name]))), None)
        done.add(name)
        return found

    return next((c for name in sorted(edges) if (c := search(name, []))), None)


def top(name: str) -> str:
    """fedhpc.data.load -> data."""
    return name.split(".")[1] if "." in name else ""


def test_a_cycle_would_be_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_imports_run_one_way() -> None:
    # What is imported for its types alone runs no code, but makes no cycle between modules either.
    assert cycle(graph(only_at_run_time=False)) is None
    assert cycle(graph(only_at_run_time=True, group=top)) is None


# From the bottom: what a part may build on.
LAYERS = [
    {"", "errors", "kernels"},
    {"lazy", "registry", "rng"},
    {"config", "builtin"},
    {"data", "results"},
    {"ranks"},
    {"models", "secure"},
    {"updates", "objectives"},
    {"methods"},
    {"attacks", "server", "training", "report", "halving"},
    {"participation", "evaluation"},
    {"privacy"},
    {"approaches"},
    {"federation"},
    {"main", "bench", "sweep", "api", "customized", "watch"},
    {"console", "evaluate", "export"},
    {"__main__"},
]


def test_every_part_has_its_layer_and_imports_only_from_below() -> None:
    level = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    edges = graph(only_at_run_time=False, group=top)
    assert set(edges) <= set(level), f"add to LAYERS: {set(edges) - set(level)}"
    upwards = [(part, other) for part in edges for other in edges[part] if level[other] >= level[part]]
    assert upwards == []


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("torch.distributed", {"ranks.transport.torch_dist", "models.sharding", "models.slices"}),
        ("mpi4py", {"ranks.transport.mpi"}),
        ("yaml", {"config.yaml"}),
        ("h5py", {"results.results_file", "report", "bench.gpu_runs", "bench.peers", "bench.rounds", "bench.scale"}),
        # A reference to compare with, and the format of the export, not a part.
        ("peft", {"bench.compute", "bench.peer_program"}),
        ("datasets", {"data.sources"}),
    ],
)
def test_who_may_import_what(library: str, allowed: set[str]) -> None:
    users = {
        m.removeprefix("fedhpc.") for m in modules() if any(f"{n}.".startswith(f"{library}.") for n in imported(m))
    }
    assert users <= allowed
    attributes = re.compile(rf"\b{re.escape(library)}\.")
    if library == "torch.distributed":  # also reachable as an attribute, with no import of its own
        text = {m: ast.unparse(_without_docstrings(tree)) for m, tree in modules().items()}
        assert {m.removeprefix("fedhpc.") for m in text if attributes.search(text[m])} <= allowed


def test_methods_and_rules_know_nothing_of_a_run() -> None:
    edges = graph(only_at_run_time=False, group=top)
    leaves = (
        "attacks",
        "server.aggregators",
        "updates.transforms",
        "training.optimizers",
        "server.optimizers",
        "methods",
    )
    allowed = {"errors", "lazy", "registry", "rng", "updates", "models", "kernels", "", "methods"}
    for module in modules():
        if module.removeprefix("fedhpc.").startswith(leaves):
            inside = {
                name
                for name in imported(module)
                if name in modules() and not name.startswith(tuple(f"fedhpc.{leaf}" for leaf in leaves))
            }
            assert {top(name) for name in inside} <= allowed, module
    assert not edges["training"] & {"participation", "server"}
    assert not edges["data"] & {"objectives", "models", "methods", "training", "ranks", "results"}
    assert {part for part in edges if "federation" in edges[part]} <= {"main", "bench"}


def test_only_these_files_tell_rank_0_from_the_rest() -> None:
    """The collectives themselves, their results that only rank 0 has, and who speaks."""
    compares = re.compile(r"\brank (==|!=|<|>|<=|>=) \d|\d (==|<|<=) (\w+\.)*rank\b")
    found = {m.removeprefix("fedhpc.") for m, tree in modules().items() if compares.search(ast.unparse(tree))}
    outside = {name for name in found if not name.startswith("ranks.")}
    assert outside <= {"federation", "main", "updates.cohort", "evaluation.evaluate"}


def _without_docstrings(tree: ast.Module) -> ast.Module:
    copied = ast.parse(ast.unparse(tree))
    for node in ast.walk(copied):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return copied


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("module", sorted(modules()))
def test_nothing_unsafe_is_called(module: str) -> None:
    tree = modules()[module]
    serialisers = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {name.split(".")[0] for name in imported(module)} & serialisers
    for name, call in calls(tree):
        assert name not in ("eval", "exec", "compile", "torch.load", "torch.save", "os.system", "yaml.unsafe_load"), (
            name
        )
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("shell") != "True"
        assert keywords.get("allow_pickle", "False") == "False"
        assert keywords.get("trust_remote_code", "False") in ("False", "model.trust_remote_code")
        if name == "yaml.load":
            assert keywords["Loader"] == "Loader"
        assert not name.endswith((".send_object", ".recv_object", "_object_list", "all_gather_object"))
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), "process-wide mutable state"


def test_the_loader_of_yaml_is_a_safe_one() -> None:
    import yaml

    from fedhpc.config.yaml import Loader

    assert issubclass(Loader, yaml.SafeLoader)


# Their interface is documented once, in `methods/base.py`, the folder's __init__ or the family's base.
_INTERFACES = {"Options"}


@pytest.mark.parametrize("module", sorted(modules()))
def test_modules_and_public_functions_say_what_they_do(module: str) -> None:
    tree = modules()[module]
    assert ast.get_docstring(tree), f"{module} has no docstring"
    missing = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and node.name not in _INTERFACES
        and not ast.get_docstring(node)
        and not (isinstance(node, ast.ClassDef) and _is_section(node))
    ]
    if module.removeprefix("fedhpc.").split(".")[0] in ("training", "server", "evaluation"):
        missing = [name for name in missing if name not in ("compute", "step")]
    assert [name for name in missing if name != "main"] == []


def _is_section(node: ast.ClassDef) -> bool:
    """A part of the configuration, whose keys are described one by one."""
    return any(ast.unparse(base) in ("Section", "Open") for base in node.bases)


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize(("family", "name"), CHOICES)
def test_a_choice_is_complete(family: str, name: str) -> None:
    options = registry.options(family, name)
    assert issubclass(options, Section)
    for key, field in options.model_fields.items():
        assert field.description, f"{family}/{name}: {key} has no description"
    stands_for_another = (family, name) == ("objectives", "auto")  # it is never made
    assert stands_for_another or not inspect.isabstract(registry.choice(family, name))


def raw_of(family: str, name: str) -> dict[str, Any]:
    """The smallest configuration that makes a choice."""
    # With sgd: some rules are defined for it alone.
    raw: dict[str, Any] = {"data": {"label": "label", "client": "client"}, "client": {"optimizer": "sgd"}}
    if family == "proposers":
        return {**raw, "method": {"name": "prompt_search", "proposers": [{"name": name}]}}
    if family == "metrics":
        return {**raw, "evaluation": {"metrics": [name]}}
    if family == "privacy" and name != "none":
        options = {"clip_norm": 1.0, "delta": 0.01, "noise_multiplier": 1.0}
        return {**raw, "server": {"weighting": "uniform"}, "privacy": {"name": name, **options}}
    section, key = next((s, k) for s, keys in CHOOSING.items() for k, f in keys.items() if f == family)
    return {**raw, section: [{key: name}] if section in ("transforms", "trackers") else {key: name}}


@pytest.mark.parametrize(("family", "name"), CHOICES)
def test_a_choice_alone_is_a_configuration_and_survives_yaml(family: str, name: str) -> None:
    config = configuration.resolve(raw_of(family, name), given={})
    again = configuration.resolve(configuration.parse_yaml(config.to_yaml(), "again"))
    assert again == config
    assert again.to_yaml() == config.to_yaml()


def test_every_key_of_the_configuration_is_described() -> None:
    for section in SECTIONS.values():
        for key, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{key}"


def test_the_configuration_loads_without_heavy_libraries() -> None:
    program = (
        "import sys\n"
        "from fedhpc import config, main\n"
        "config.load(None, [])\n"
        "heavy = {'torch', 'transformers', 'h5py', 'peft', 'mpi4py', 'datasets'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")

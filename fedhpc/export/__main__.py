"""What a run trained, in the form that others take.

    python -m fedhpc.export RUN --adapter DIR [--client NAME | --round N]      an adapter's folder, as PEFT loads it
    python -m fedhpc.export RUN --merge DIR [--dtype bfloat16]                 a model folder, which every server loads
    python -m fedhpc.export RUN --gguf FILE                                    a LoRA for llama.cpp
    python -m fedhpc.export RUN [--merge DIR] --push OWNER/NAME                to the hub: the model, or the adapter

RUN is a run directory, finished or not; of an unfinished run its last round is exported. --client is the name or number
of a client, whose own model is exported; --round another round that the run keeps. Each folder has a card (README.md):
how to use it, the data, the test, what privacy was spent, this command.

Exit codes: 0 done; 1 not brought to the hub (what other options wrote stays; --push alone keeps nothing); 2 bad command
or run, or something cannot be read or written.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError

from fedhpc import config as configuration
from fedhpc.errors import UserError
from fedhpc.export.hub import PushError, push, require_name
from fedhpc.ranks import process
from fedhpc.ranks.startup import DONE, FAILED, REFUSED

_DTYPES = ("float32", "bfloat16", "float16", "float64")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see python -m fedhpc.export --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse(words)
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in fedhpc.main
        write(options)
    except (UserError, OSError, SafetensorError) as error:
        print(f"fedhpc: error: {error if isinstance(error, UserError) else _of_files(error)}", file=sys.stderr)
        return FAILED if isinstance(error, PushError) else REFUSED
    return DONE


def _of_files(error: OSError | SafetensorError) -> UserError:
    """The line for a file or folder that cannot be read or written."""
    named, reason = getattr(error, "filename", None), getattr(error, "strerror", None) or str(error)
    return UserError(
        f"'{named}' cannot be read or written: {reason}" if named else f"cannot read or write: {reason}",
        remedy="see that it may be written, and that the disk has room; then give the same command again",
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, which say what to write. UserError where they do not, or exclude each other."""
    parser = _Parser(prog="fedhpc export", description="What a run trained, in the form that others take.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory")
    add("--adapter", type=Path, metavar="DIR", help="write the adapter's folder (of full fine-tuning: the model's)")
    add("--merge", type=Path, metavar="DIR", help="write a model folder with what was trained in its weights")
    add("--dtype", choices=_DTYPES, help="of the weights of --merge; default: that of the base")
    add("--client", metavar="NAME", help="the model of one client, by its name or number")
    add("--round", type=int, metavar="N", help="another round than the one that the run ends with")
    add("--base", metavar="BASE", help="folder of the base, if not where the run had it, or its hub id")
    add("--gguf", type=Path, metavar="FILE", help="write a LoRA for llama.cpp (bases of Llama, Mistral, Qwen2, Qwen3)")
    add("--push", metavar="OWNER/NAME", help="bring the folder of --merge, or else the adapter, to the model hub")
    options = parser.parse_args(list(arguments))
    if (options.adapter, options.merge, options.gguf, options.push) == (None, None, None, None):
        raise UserError(
            "command line: it is not said what to write",
            remedy="give --adapter DIR, --merge DIR, --gguf FILE or --push OWNER/NAME",
        )
    if options.client is not None and options.round is not None:
        raise UserError("command line: --client and --round: what a client has of its own is kept as it last was",
                        remedy="take one of them out")  # fmt: skip
    if options.dtype and options.merge is None:
        raise UserError("command line: --dtype is of the weights of --merge", remedy="give --merge DIR too")
    targets = [path.resolve() for path in (options.adapter, options.merge, options.gguf) if path is not None]
    if len({*targets}) < len(targets):
        raise UserError("command line: two options write to the same place", remedy="give each a name of its own")
    return options


def write(options: argparse.Namespace) -> None:
    """Write what the options ask for, and print a line for each."""
    from fedhpc.report.runs import load_run
    from fedhpc.results.resume import FREE_SECTIONS

    run = load_run(options.run)
    tree = {key: value for key, value in run.config.items() if key not in FREE_SECTIONS}
    config = configuration.restore(tree, f"{options.run}: configuration")
    process.set_environment(config)

    from fedhpc.approaches.export import CARD, card
    from fedhpc.customized import require_base
    from fedhpc.export import llama_cpp, merged, sentence_encoder
    from fedhpc.export.card import section
    from fedhpc.export.source import of_run, require_public, take_over
    from fedhpc.export.target import require_new, written

    for path in (options.adapter, options.merge, options.gguf):
        if path is not None:
            require_new(path, is_folder=path is not options.gguf)
    if options.push is not None:
        require_name(options.push)
    base = options.base
    if base is not None and Path(base).expanduser().exists():
        base = os.path.abspath(Path(base).expanduser())
    with tempfile.TemporaryDirectory(prefix="fedhpc-") as temporary:
        source = of_run(run, config, Path(temporary) / "source", options.client, options.round, base)
        base = None if source.is_on_given else base
        require_base(source.folder, base)
        if options.push is not None and options.merge is None:
            require_public(source, base)
        of_this_run = section(run, config, source, _for_cards(options))
        if options.gguf is not None:
            with written(options.gguf) as partial:
                llama_cpp.write(source.folder, partial, base)
            print(f"wrote {options.gguf}: the LoRA of {source.of} for llama.cpp")
        if options.merge is not None:
            merge = sentence_encoder.merge if sentence_encoder.fits(source.folder) else merged.merge
            with written(options.merge) as partial:
                difference, on = merge(source.folder, partial, options.dtype, base)
                text = card(on, {}, config, source.promise)
                (partial / CARD).write_text(f"{text}\n{of_this_run}", encoding="utf-8")
            print(f"wrote {options.merge}: {source.of}, merged in {difference}")
        adapter = options.adapter or Path(temporary) / "adapter"
        if options.adapter is not None or (options.push is not None and options.merge is None):
            with written(adapter) as partial:
                take_over(source, partial, base, of_this_run)
        if options.adapter is not None:
            print(f"wrote {options.adapter}: the adapter of {source.of}")
        if options.push is not None:
            print(f"pushed {source.of}: {push(options.merge or adapter, options.push, f'fedhpc: {source.of}')}")


def _for_cards(options: argparse.Namespace) -> list[str]:
    """The command as cards have it, quoted for a shell; of paths the last parts."""
    from fedhpc.approaches.export import for_others

    words = ["fedhpc", "export"]
    for name, value in vars(options).items():
        if value is not None:
            word = value.resolve().name if isinstance(value, Path) else str(value)
            words += [] if name == "run" else [f"--{name}"]
            words.append(shlex.quote(for_others(word) if name == "base" else word))
    return words


if __name__ == "__main__":
    sys.exit(main())

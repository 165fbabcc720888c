"""Small federations for tests: several ranks as threads of one process, and what a run left behind.

The transport of threads stands in for nothing: gloo and MPI have tests of their own and spawned representatives. It
makes matrices of many ranks cheap, since torch and transformers are imported once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from fedhpc import config as configuration
from fedhpc import federation
from fedhpc.approaches.base import AnyApproach
from fedhpc.approaches.prepare import prepare
from fedhpc.builtin.world import rows
from fedhpc.config import Config
from fedhpc.models.load import BUILTIN
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport, Transport
from fedhpc.results.results_file import Results

# From this release on PEFT (0.21.2) hands what stands in front of a text on under a name that models do not have: while
# it generates it is forgotten, and an encoder is refused. The cards of exports say so.
PEFT_FORGETS = Version(transformers.__version__) >= Version("5.24")


def compare_with_peft(method: str) -> None:
    """Skip the rest of a test, which compares with PEFT, where this PEFT has no prefix to compare with."""
    if method == "prefix" and PEFT_FORGETS:
        pytest.skip("PEFT 0.21 has no prefix with transformers 5.24")


class Interrupted(Exception):  # noqa: N818  not an error of the program
    """The run was stopped at a collective, as a signal would."""


@dataclass
class _Group:
    """What the threads of one federation share."""

    size: int
    stop_at: int | None  # the collective at which rank 0 stops, counted from 1
    board: list[Any] = field(default_factory=list)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.board = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=120)


class ThreadTransport(Transport):
    """One rank of a group of threads."""

    name = "threads"

    def __init__(self, rank: int, group: _Group) -> None:
        super().__init__(rank, group.size)
        self._group = group
        self.collectives = 0

    def close(self) -> None:
        pass

    def _shared(self, mine: Any) -> list[Any]:
        """Every rank's value, on all ranks."""
        self.collectives += 1
        if self.rank == 0 and self.collectives == self._group.stop_at:
            raise Interrupted
        self._group.barrier.wait()
        self._group.board[self.rank] = mine
        self._group.barrier.wait()
        return list(self._group.board)

    def _done(self) -> None:
        # Nobody may change its tensor before all have read it.
        self._group.barrier.wait()

    def _broadcast(self, tensor: Tensor) -> None:
        root = self._shared(tensor)[0]
        if self.rank:
            tensor.copy_(root)
        self._done()

    def _reduce_sum(self, tensor: Tensor) -> None:
        total = torch.stack(self._shared(tensor)).sum(dim=0)
        self._done()
        # As in MPI, what the others are left with is not defined.
        tensor.copy_(total) if self.rank == 0 else tensor.fill_(7)

    def _all_reduce_max(self, tensor: Tensor) -> None:
        most = torch.stack(self._shared(tensor)).amax(dim=0)
        self._done()
        tensor.copy_(most)

    def _exchange(self, send: dict[int, Tensor], receive: dict[int, Tensor]) -> None:
        sent = self._shared(send)
        for peer, buffer in receive.items():
            buffer.copy_(sent[peer][self.rank])
        self._done()


class _Sized(LoopbackTransport):
    """What rank 0 sees of a group while it prepares."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size


def federate(config: Config, ranks: int = 1, **options: Any) -> int:
    """`federate_together` of one run."""
    return federate_together([config], ranks, **options)


def federate_together(
    configs: Sequence[Config],
    ranks: int = 1,
    stop_at: int | None = None,
    fresh: bool = False,
    on_round: Callable[[int], None] = lambda round_: None,
    until: int | None = None,
) -> int:
    """Run `configs` on so many threads; the number of collectives that rank 0 took part in.

    With `stop_at` it is interrupted at that collective and Interrupted is raised, with `until` it pauses after that
    round. Errors of a rank are raised.
    """
    group = _Group(ranks, stop_at)
    errors: list[BaseException] = []
    transports = [ThreadTransport(rank, group) for rank in range(ranks)]

    # One after the other, since transformers does not load models in two threads at once.
    seen = _Sized(ranks)

    def prepared() -> list[AnyApproach]:
        made: list[AnyApproach] = []
        for config in configs:
            made.append(prepare(config, seen, Launch(), True, made))
        return made

    tasks = [prepared()]
    while len(tasks) < ranks:
        # Prefixes leave the base alone, so threads can share it; other methods and heads hook it or swap its weights,
        # and the clock of buffered rounds runs as plans are asked for.
        moves = configs[0].federation.schedule.name == "buffered"
        again = len(configs) > 1 or configs[0].method.name != "prefix" or tasks[0][0].base.head or moves
        tasks.append(prepared() if again else tasks[0])

    def one(rank: int) -> None:
        try:
            runs = [federation.Run(task, on_round, nullcontext()) for task in tasks[rank]]
            federation.run_together(runs, transports[rank], fresh, until)
        except BaseException as error:  # handed to the caller
            errors.append(error)
            group.barrier.abort()

    others = [threading.Thread(target=one, args=(rank,)) for rank in range(1, ranks)]
    for thread in others:
        thread.start()
    one(0)
    for thread in others:
        thread.join()
    causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)] or errors
    if causes:
        raise causes[0]
    return transports[0].collectives


def on_threads(ranks: int, step: Callable[[Transport], Any]) -> list[Any]:
    """`step` on every rank of a group of threads: what each returns, in rank order."""
    group = _Group(ranks, None)
    results: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            results[rank] = step(ThreadTransport(rank, group))
        except BaseException as error:  # handed to the caller
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def settings(folder: Path, tree: dict[str, Any]) -> Config:
    """The configuration `tree` with the run directory `folder`; what its method does not read is left out."""
    return configuration.resolve({**tree, "run": {"name": "test", **tree.get("run", {}), "dir": str(folder)}}, given={})


def write_texts(folder: Path) -> Path:
    """A few real examples in `folder` and, in model/, a small random model: all that is slow is small."""
    for split, count in (("train", 90), ("validation", 10), ("test", 10)):
        lines = [json.dumps(row) for row in rows("dining", split)[:count]]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    save_random_llama(folder / "model")
    return folder


def save_random_llama(folder: Path) -> None:
    """A random grouped-query Llama in float64 with the tokenizer of the built-in base."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p.mul_(8.0)  # so that what a payload does shows
    model.save_pretrained(folder)


def save_random_bert(folder: Path) -> None:
    """A random bare encoder (no head) in float64, with a tokenizer that puts [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = sorted({word for row in rows("dining", "train")[:90] for word in row["mr"].replace(",", " ").split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = BertModel(shape).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0 if p.ndim == 2 else 1.0)  # so that what a payload does shows
    model.save_pretrained(folder)


def save_random_t5(folder: Path) -> None:
    """A random T5 in float64, with a tokenizer of words that puts </s> behind a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    texts = [row[column] for row in rows("dining", "train")[:90] for column in ("mr", "ref")]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    shape = T5Config(
        vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(shape).double().save_pretrained(folder)


def tree(texts: Path, **changes: Any) -> dict[str, Any]:
    """A small federation; `changes` are merged into its sections."""
    raw: dict[str, Any] = {
        "model": {"name": str(texts / "model")},
        "data": {"source": str(texts), "label": "label", "client": "client"},
        "partition": {"name": "quantity_skew", "num_clients": 8, "alpha": 2.0},
        "method": {"name": "prefix", "num_virtual_tokens": 4},
        "federation": {"rounds": 1, "cohort_size": 6},
        "client": {"optimizer": "sgd", "lr": 10.0, "batch_size": 3, "steps": 2},
        "evaluation": {"every": 1, "samples": 0, "max_new_tokens": 8},
    }
    for section, value in changes.items():
        raw[section] = {**raw.get(section, {}), **value} if isinstance(value, dict) else value
    return raw


def final(run_dir: Path) -> dict[str, np.ndarray]:
    """The final payload of a run that is complete."""
    with h5py.File(run_dir / "results.h5") as file:
        assert file.attrs["complete"]
        found = {}
        file["final"].visititems(lambda n, d: found.update({n: d[()]}) if isinstance(d, h5py.Dataset) else None)
    return found


def items_of(run_dir: Path) -> dict[str, str]:
    """What each metric of the test was measured on, like "300 examples"; all with an interval around the value."""
    results = Results.read(run_dir / "results.h5")
    found = {}
    for group in ("test", "base"):
        for name, value in results.groups[group].items():
            one = results.sampling(f"{group}/{name}")
            assert one is not None and one.low <= value <= one.high, (group, name, one)
            found[f"{group}/{name}"] = one.items
    return found


def table(run_dir: Path, name: str) -> dict[str, np.ndarray]:
    """A table of results.h5 as its readers see it."""
    with h5py.File(run_dir / "results.h5") as file:
        return {n: d.asstr()[()] if h5py.check_string_dtype(d.dtype) else d[()] for n, d in file[name].items()}

"""What a run exported, loaded for use: it writes the texts, or gives the logits, of the run's own test.

    model = fedhpc.load("runs/mine/adapter")
    model.generate(["name[Aromi], area[city centre] :"], max_new_tokens=64)

A base is loaded and a method attached to it as in the run itself, so the texts depend neither on PEFT nor on how a
version of transformers passes its cache on, and a row's text is the same alone and in a batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedhpc import kernels
from fedhpc.approaches.export import FACTS, TEMPLATE
from fedhpc.config import QUANTIZATION, Model
from fedhpc.data import chats
from fedhpc.data.chat_template import ChatTemplate
from fedhpc.data.chat_tokens import Writer
from fedhpc.data.tokens import prompt_ids
from fedhpc.errors import UserError
from fedhpc.methods import adapter as bottleneck
from fedhpc.methods import ia3 as rescaling
from fedhpc.methods._peft import adapter_config, adapter_tensors, read_json, without_wrappers
from fedhpc.methods.base import Method, Tensors, as_one_client
from fedhpc.methods.ia3 import IA3
from fedhpc.methods.lora import Lora, options_of
from fedhpc.methods.prefix import PREFIX, Prefix
from fedhpc.methods.prompt import Prompt
from fedhpc.models.base import Attached, Base, padded
from fedhpc.models.encoder import Classifier
from fedhpc.models.generative import Generative
from fedhpc.models.load import autocast, load_base
from fedhpc.ranks.group import Group


@dataclass(frozen=True)
class Customized:
    """A base with what a run trained for it."""

    base: Base
    method: Method | None  # None: the weights of the base are the customized ones
    payload: Tensors
    max_length: int  # tokens of a prompt, special ones included; a longer one is cut as in the run
    precision: str  # as in `runtime.precision`
    chat_template: str | None = None  # of the run; None: the tokenizer's own

    @property
    def model(self) -> Any:
        """The transformers model of the base; prefixes and the like are not a part of it."""
        return self.base.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the base."""
        return self.base.tokenizer

    def generate(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, object]]],
        max_new_tokens: int = 64,
        batch_size: int = 32,
    ) -> list[str]:
        """The text that the model writes behind each prompt: the likeliest token, again and again, up to its end.

        prompts: texts, rendered as the run's `data.prompt`, to which special tokens are added here; or chats, lists of
        {role, content}, to which the assistant's next turn is written. batch_size: how many are written at once, which
        changes no text. UserError for a model that writes none.
        """
        base = self.base
        if not isinstance(base, Generative):
            raise UserError(f"'{base.name}' is used for {base.task} and writes no texts; use logits")
        texts: list[str] = []
        ends: tuple[int, ...] = ()
        if prompts and not any(isinstance(prompt, str) for prompt in [prompts, *prompts]):
            writer = self._writer()
            ids, ends = self._questions(writer, prompts), writer.ends
        else:
            ids = self._ids(prompts)
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            with self.attached(len(part)) as attached:
                generated = base.generate(attached, part, max_new_tokens, ends)
            texts += [base.text(row) for row in generated.cpu().numpy()]
        return texts

    def logits(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Logits of a classifier: float (texts, classes) on the CPU, classes as in `model.config.id2label`.

        UserError for a model that is none.
        """
        base = self.base
        if not isinstance(base, Classifier):
            raise UserError(f"'{base.name}' is used for {base.task} and has no logits of classes; use generate")
        rows = [torch.empty(0, base.num_classes)]
        of_texts = self._ids(texts)
        for start in range(0, len(of_texts), batch_size):
            part = of_texts[start : start + batch_size]
            ids, mask = (kernels.on_device(array, base.device) for array in padded(part, base.pad_id))
            with self.attached(len(part)) as attached:
                rows.append(base.class_logits(attached, ids, mask).cpu())
        return torch.cat(rows)

    def _ids(self, texts: Sequence[object]) -> list[NDArray[np.int32]]:
        """The token ids of texts."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"a list of texts is needed, got {type(texts).__name__}")
        return prompt_ids([str(text) for text in texts], self.base.tokenizer, self.max_length, self.base)

    def _writer(self) -> Writer:
        """How chats become tokens."""
        template = ChatTemplate.load(self.base.tokenizer, None) if self.chat_template is None else None
        template = template or ChatTemplate(self.base.tokenizer, self.chat_template, TEMPLATE)
        return Writer(self.base.tokenizer, template, "assistant", self.max_length, "error")

    def _questions(self, writer: Writer, prompts: Sequence[object]) -> list[NDArray[np.int32]]:
        """The token ids of chats, with the prompt for generation."""
        texts = [
            writer.template.question(chats.messages(prompt, "prompts", f"chat {number}"), None, f"chat {number}")
            for number, prompt in enumerate(prompts, 1)
        ]
        return [np.array(one, np.int32) for one in writer.question_ids(texts)]

    @contextmanager
    def attached(self, rows: int) -> Iterator[Attached]:
        """What was trained is in the base, for a batch of that many rows, while the context is open."""
        with torch.no_grad(), autocast(self.base, self.precision):
            if self.method is None:
                yield Attached()
                return
            received = as_one_client(self.payload)
            trained = self.method.start(received)
            of_client = torch.zeros(rows, dtype=torch.int64, device=self.base.device)
            with self.method.attach(trained, received, of_client) as attached:
                yield attached


def load(
    adapter: str | os.PathLike[str],
    base: str | None = None,
    device: str = "cpu",
    offload: Literal["none", "cpu"] = "none",
    group: Group | None = None,
) -> Customized:
    """Load the `adapter/` of a complete run.

    base: the folder or hub id of the base, where it is another than the export names. device: as torch names it.
    offload: as `model.offload`. group: the ranks that hold the layers of the base between them.
    UserError where there is no export, or its base cannot be loaded.
    """
    folder = Path(adapter)
    config = _config(folder)
    # Older exports have no such file: no prompt is cut then, and the base is loaded in float32.
    facts = {"max_length": 10**9, "precision": "float32", **read_json(folder / FACTS, missing_ok=True)}
    model = model_of(folder, base).model_copy(update={"offload": offload})
    try:
        ready = load_base(model, torch.device(device), classes_of(folder), group=group)
    except UserError as error:
        raise error if base is None else error.but(key="base") from error
    template = folder / TEMPLATE
    chat_template = template.read_text(encoding="utf-8") if template.is_file() else None
    of_run = (facts["max_length"], facts["precision"], chat_template)
    if "base_model_name_or_path" not in config:
        return Customized(ready, None, {}, *of_run)
    tensors = adapter_tensors(folder, ready)
    _put_head(ready, tensors, folder)
    if config.get("format") == bottleneck.FORMAT:
        bottleneck.load(ready.model, folder)
        return Customized(ready, None, {}, *of_run)
    method, payload = _METHODS[str(config.get("peft_type", config.get("format")))](ready, config, tensors)
    shapes = {name: tuple(t.shape) for name, t in payload.items()}
    if shapes != dict(method.payload.shapes):
        raise UserError(f"'{folder}' belongs to another base than '{model.name}': its tensors do not fit")
    return Customized(ready, method, {n: t.to(ready.device) for n, t in payload.items()}, *of_run)


def model_of(folder: Path, base: str | None = None) -> Model:
    """The base of an export that `load` takes, as `base_of` says it."""
    _config(folder)
    return base_of(folder, base)


def base_of(folder: Path, base: str | None = None) -> Model:
    """The base of an export as the configuration names it, or another one; of a whole model, the folder itself."""
    require_base(folder, base)
    config, facts = adapter_config(folder), read_json(folder / FACTS, missing_ok=True)
    name = base or config.get("base_model_name_or_path") or str(folder)
    options = {key: facts[key] for key in ("task", "dtype", *QUANTIZATION) if key in facts}
    revision = config.get("revision") if base is None else None
    return Model.model_validate({"name": name, "revision": revision, **options})


def require_base(folder: Path, base: str | None) -> None:
    """UserError where another base is given for an export that has none: its own weights are what was trained."""
    if base is not None and "base_model_name_or_path" not in adapter_config(folder):
        raise UserError(f"'{folder}' is a whole model and has no base", remedy="leave --base out")


def classes_of(folder: Path) -> list[str]:
    """The classes of an exported classifier, in the order of its head; none of other models."""
    names = read_json(folder / "config.json", missing_ok=True).get("id2label", {})
    return [names[number] for number in sorted(names, key=int)]


def _config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json, or config.json, of an export. UserError, with what is there instead, for another."""
    config = adapter_config(folder)
    what = config.get("peft_type") or config.get("format")
    if what is not None and what not in (bottleneck.FORMAT, *_METHODS):
        raise UserError(
            f"'{folder}' is no adapter that fedhpc loads ({what})", remedy="give the adapter/ of a complete run"
        )
    return config


def _put_head(base: Base, tensors: dict[str, Tensor], folder: Path) -> None:
    """Move what is stored of the base itself, a classifier's head, from `tensors` into the base.

    Also what PEFT stores with it and no run trains, as the norm in ModernBERT's head. UserError where a part that is
    trained is missing: the base has random numbers there.
    """
    parameters = dict(base.model.named_parameters())
    stored = {n.removeprefix("base_model.").removeprefix("model."): n for n in tensors}
    trained = [name for path in base.head for name in (f"{path}.weight", f"{path}.bias") if name in parameters]
    for name in trained:
        if name not in stored:
            raise UserError(f"'{folder}' lacks {name}, which every run of a classifier trains and exports")
    for name in stored.keys() & parameters.keys():
        value = tensors.pop(stored[name])
        if value.shape != parameters[name].shape:
            raise UserError(f"'{folder}' belongs to another base than '{base.name}': {name} does not fit")
        parameters[name].data.copy_(value)


_Loaded = tuple[Method, Tensors]


def _prefix(base: Base, config: Mapping[str, Any], tensors: Tensors) -> _Loaded:
    method = Prefix(Prefix.Options.model_validate(_virtual(config)), base, 0)
    return method, {PREFIX: base.from_peft_prefix(tensors[PREFIX])}


def _prompt(base: Base, config: Mapping[str, Any], tensors: Tensors) -> _Loaded:
    return Prompt(Prompt.Options.model_validate(_virtual(config)), base, 0), tensors


def _lora(base: Base, config: Mapping[str, Any], tensors: Tensors) -> _Loaded:
    method = Lora(Lora.Options.model_validate(options_of(config, tensors)), base, 0)
    return method, method.factors_of(tensors)


def _ia3(base: Base, config: Mapping[str, Any], tensors: Tensors) -> _Loaded:
    inputs = config["feedforward_modules"]
    outputs = [name for name in config["target_modules"] if name not in inputs]
    return IA3(IA3.Options(outputs=outputs, inputs=inputs), base, 0), without_wrappers(tensors)


def _ia3_of_experts(base: Base, config: Mapping[str, Any], tensors: Tensors) -> _Loaded:
    return IA3(IA3.Options(outputs=config["outputs"], inputs=config["inputs"]), base, 0), tensors


def _virtual(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_virtual_tokens": config["num_virtual_tokens"]}


_METHODS: dict[str, Callable[[Base, Mapping[str, Any], Tensors], _Loaded]] = {
    "PREFIX_TUNING": _prefix,
    "PROMPT_TUNING": _prompt,
    "P_TUNING": _prompt,
    "LORA": _lora,
    "IA3": _ia3,
    rescaling.FORMAT: _ia3_of_experts,
}

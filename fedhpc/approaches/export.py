"""Writing what a run ends with: the method's own export, what `fedhpc.load` must know of it, and a card for people.

The export is in the format of its own library (PEFT, transformers). `fedhpc.json` beside it has what those say nothing
of; README.md says how to use it, and with which versions the libraries themselves are right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedhpc import __version__
from fedhpc.config import Config
from fedhpc.data.chat_template import ChatTemplate
from fedhpc.methods._linear import ends_with
from fedhpc.methods.base import Method, Tensors
from fedhpc.models.base import Base

FACTS = "fedhpc.json"
TEMPLATE = "chat_template.jinja"  # as transformers calls it
CLIENTS = "clients.json"  # names of the clients, beside their adapters' folders, which are numbers
# What loads a base and its adapter at once, by PEFT's type of task.
_IN_PEFT = {
    "CAUSAL_LM": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(".", dtype="{dtype}")""",
    "SEQ_2_SEQ_LM": """from peft import AutoPeftModelForSeq2SeqLM

model = AutoPeftModelForSeq2SeqLM.from_pretrained(".", dtype="{dtype}")""",
    "SEQ_CLS": """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig

names = AutoConfig.from_pretrained(".")  # of the classes
model = AutoPeftModelForSequenceClassification.from_pretrained(
    ".", dtype="{dtype}", id2label=names.id2label, label2id=names.label2id,
    ignore_mismatched_sizes=True,  # the head is the adapter's, whatever size the base's own has
)""",
}
_WRITES = "PEFT's own `generate` writes the same texts (tried with transformers 5.20 to 5.24 and PEFT 0.21.2)."
_RIGHT = {"CAUSAL_LM": _WRITES, "SEQ_2_SEQ_LM": _WRITES}
_PROMPT_OF_DECODER = (
    "PEFT's own `generate` writes the same texts with transformers 5.20 to 5.23, one prompt at a time: in a padded "
    "batch it counts positions otherwise. **With transformers 5.24 and PEFT 0.21.2 it is wrong and says nothing:** "
    "only the first token is this adapter's, the others are as if nothing stood in front of the text. Its losses and "
    "single forward passes are right. `fedhpc.load` is right with all of these versions."
)
_PREFIX = (
    "PEFT's own `generate` writes the same texts with transformers 5.20 to 5.23{alone}. **With transformers 5.24 and "
    "PEFT 0.21.2 it is wrong and says nothing:** it writes the text of the untuned base. Its losses and single forward "
    "passes are right. `fedhpc.load` is right with all of these versions."
)
_TIED = (
    "It changes the output layer, whose weight this base shares with its embeddings. **Do not merge it into the base:**"
    " PEFT's `merge_and_unload` would change the embeddings too."
)
# (type of adapter, type of task) -> with which versions PEFT is right; the others always are.
_VERSIONS = {
    ("PROMPT_TUNING", "CAUSAL_LM"): _PROMPT_OF_DECODER,
    ("P_TUNING", "CAUSAL_LM"): _PROMPT_OF_DECODER,
    ("PREFIX_TUNING", "CAUSAL_LM"): _PREFIX.format(
        alone=", one prompt at a time: in a padded batch it may count positions otherwise"
    ),
    ("PREFIX_TUNING", "SEQ_2_SEQ_LM"): _PREFIX.format(alone=""),
    ("PREFIX_TUNING", "SEQ_CLS"): (
        "PEFT 0.21.2 refuses a prefix of an encoder with transformers 5.24; with 5.20 to 5.23 it is right. "
        "`fedhpc.load` is right with all of these versions."
    ),
}


def write_client_names(folder: Path, names: Sequence[str] | None) -> None:
    """Say in the folder of the clients' adapters whose they are: {"0": "Blue Spice", ...}; nothing without names."""
    if names is not None:
        text = json.dumps(dict(enumerate(names)), indent=2, ensure_ascii=False)
        (folder / CLIENTS).write_text(text + "\n", encoding="utf-8")


def export(method: Method, values: Tensors, folder: Path, config: Config, promise: str = "") -> None:
    """Write a payload to `folder`, with what is needed to use it. promise: of its privacy, a line for the card."""
    folder.mkdir(parents=True, exist_ok=True)
    method.export(values, folder)
    file = folder / "adapter_config.json"
    adapter: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    base = method.base
    facts = {
        "fedhpc_version": __version__,
        "task": base.task,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantize": base.quantize,
        "max_length": config.data.max_length,
        "precision": config.runtime.precision,
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if config.data.messages is not None and config.data.chat_template is not None:
        program = ChatTemplate.load(base.tokenizer, config.data.chat_template).program()
        (folder / TEMPLATE).write_text(program, encoding="utf-8")
    (folder / "README.md").write_text(_card(base, adapter, config, promise), encoding="utf-8")


def _card(base: Base, adapter: dict[str, Any], config: Config, promise: str) -> str:
    """The README.md of an export. adapter: its adapter_config.json, empty for a model folder."""
    library = "peft" if "peft_type" in adapter else "fedhpc" if adapter else "transformers"
    dtype = str(base.dtype).removeprefix("torch.")
    parts = [
        f"---\nbase_model: {json.dumps(base.source)}\nlibrary_name: {library}\ntags: [fedhpc]\n---",
        f"# {config.run.name}",
        f"Made by fedhpc {__version__}: {config.mode}, method {config.method.name}, {config.federation.rounds} rounds, "
        f"on `{base.source}` in {dtype}. In this folder:",
        _use(base, config),
    ]
    if library == "peft" and base.task_type in _IN_PEFT:
        parts += ["The same with PEFT:", _code("python", _IN_PEFT[base.task_type].format(dtype=dtype))]
        parts.append(_VERSIONS.get((adapter["peft_type"], base.task_type), _RIGHT.get(base.task_type, "")))
        parts.append(_TIED if _changes_embeddings(base, adapter) else "")
    elif library == "transformers":
        parts.append("It is a whole model: transformers loads the folder like any other.")
    parts += [_rows(base, config, int(adapter.get("num_virtual_tokens", 0))), promise]
    return "\n\n".join(part for part in parts if part) + "\n"


def _changes_embeddings(base: Base, adapter: dict[str, Any]) -> bool:
    """Whether the adapter is on an output layer that has the weight of the embeddings."""
    output = base.model.get_output_embeddings()
    if output is None or output.weight is not base.model.get_input_embeddings().weight:
        return False
    paths = [path for path, module in base.model.named_modules() if module is output]
    return any(ends_with(path, name) for path in paths for name in adapter.get("target_modules", ()))


def _use(base: Base, config: Config) -> str:
    """The lines that use an export."""
    if base.task == "embedding":
        return _code("yaml", "method: {name: rag, retriever: .}  # in the configuration of a search")
    text = json.dumps(config.data.prompt, ensure_ascii=False)
    if config.data.messages is not None:
        text = '[{"role": "user", "content": "Hello"}]'
    call = f"generate([{text}], max_new_tokens=64)" if "texts" in base.answers else f"logits([{text}])"
    return _code("python", f'import fedhpc\n\nmodel = fedhpc.load(".")\nprint(model.{call})')


def _code(language: str, lines: str) -> str:
    return f"```{language}\n{lines}\n```"


def _rows(base: Base, config: Config, virtual: int) -> str:
    """The special tokens and positions of the rows that it was trained on."""
    tokenizer = base.tokenizer
    if config.data.messages is not None:
        text = (
            f"A row was a chat as {'`' + TEMPLATE + '`' if config.data.chat_template else 'the chat template'} has it"
        )
    elif base.task != "causal_lm":
        text = "Texts were tokenised as `tokenizer(text)` does"
    elif tokenizer.bos_token_id is None:
        text = f"A row was prompt, target and `{tokenizer.eos_token}`; the tokenizer has no bos"
    else:
        itself = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        text = (
            f"A row was `{tokenizer.bos_token}` (bos), prompt, target and `{tokenizer.eos_token}`; `tokenizer(text)` "
            + ("puts that bos there" if itself else "does not put that bos there, so put it in front of a prompt")
        )
    behind = f" The first token of a text stood at position {virtual}, behind the virtual ones." if virtual else ""
    return f"{text}. Rows were padded on the right.{behind}"

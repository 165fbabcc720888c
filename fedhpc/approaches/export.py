"""Writing what a run ends with: the method's own export, what `fedhpc.load` must know of it, and a card for people.

The export is in the format of its own library (PEFT, transformers). `fedhpc.json` beside it has what those say nothing
of; README.md says how to use it, and with which versions the libraries themselves are right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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
CARD = "README.md"
_BASE_MODEL = "base_model: {}"  # in the head of a card
_ON_BASE = re.compile(r"(?m)^(Made by fedhpc .*?, on )`([^`]*)`")
CLIENTS = "clients.json"  # names of the clients, beside their adapters' folders, which are numbers
# What loads a base and its adapter at once, by PEFT's type of task.
_IN_PEFT = {
    "CAUSAL_LM": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(".", dtype="{dtype}"{bits})""",
    "SEQ_2_SEQ_LM": """from peft import AutoPeftModelForSeq2SeqLM

model = AutoPeftModelForSeq2SeqLM.from_pretrained(".", dtype="{dtype}"{bits})""",
    "SEQ_CLS": """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig

names = AutoConfig.from_pretrained(".")  # of the classes
model = AutoPeftModelForSequenceClassification.from_pretrained(
    ".", dtype="{dtype}"{bits}, id2label=names.id2label, label2id=names.label2id,
    ignore_mismatched_sizes=True,  # the head is the adapter's, whatever size the base's own has
)""",
}
_IN_SENTENCE_TRANSFORMERS = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")
questions = model.encode_query(["Where can I eat by the river?"])
passages = model.encode_document(["The Blue Spice is by the river."])
print(model.similarity(questions, passages))
```

Only questions go through the map that was trained. Passages have the vectors of the untuned encoder, so an index of
them stays as it is. Plain `encode` is refused: it does not say which of the two a text is. Tried with
sentence-transformers 5.0.0, 5.2.0 and 6.2.0; older ones do not load it."""
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
    "It changes the output layer, whose weight this base shares with its embeddings. **Do not merge it with PEFT:**"
    " PEFT's `merge_and_unload` would change the embeddings too; `fedhpc export RUN --merge` does not."
)
_MAGNITUDES = (
    "It is DoRA: beside the low-rank term it sets the length of each row of a weight. PEFT's `merge_and_unload` merges "
    "it into the base (tried with PEFT 0.21.2)."
)
_START = (
    "Its factors have twice the rank that was trained: training began with a part of the base's own weights "
    "(`init_lora_weights: {name}`), and the second half takes that part out again, so the base is the published one. "
    "PEFT merges it like any LoRA."
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
        **base.quantization,
        "max_length": config.data.max_length,
        "precision": config.runtime.precision,
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if config.data.messages is not None and config.data.chat_template is not None:
        program = ChatTemplate.load(base.tokenizer, config.data.chat_template).program()
        (folder / TEMPLATE).write_text(program, encoding="utf-8")
    (folder / CARD).write_text(card(base, adapter, config, promise, serving(method, adapter)), encoding="utf-8")


def serving(method: Method, exported: Mapping[str, Any] | None = None) -> str:
    """What servers need to take an export of a language model, as `Method.serving` says; empty for other models."""
    return method.serving(exported) if method.base.task == "causal_lm" else ""


def card(base: Base, adapter: Mapping[str, Any], config: Config, promise: str, served: str = "") -> str:
    """The README.md of an export. adapter: its adapter_config.json, empty for a model folder. served: by what."""
    library = "peft" if "peft_type" in adapter else "fedhpc" if adapter else "transformers"
    if not adapter and base.task == "embedding":
        library = "sentence-transformers"
    dtype = str(base.dtype).removeprefix("torch.")
    # A hub takes the id of a model there, and no folder.
    of_base = [] if is_path(base.source) else [_BASE_MODEL.format(json.dumps(base.source))]
    named = base.name if base.name == "builtin" else for_others(base.source)
    parts = [
        "\n".join(["---", *of_base, f"library_name: {library}", "tags: [fedhpc]", "---"]),
        f"# {config.run.name}",
        f"Made by fedhpc {__version__}: {config.mode}, method {for_others(config.method.name)}, "
        f"{config.federation.rounds} rounds, on `{named}` in {dtype}. In this folder:",
        _IN_SENTENCE_TRANSFORMERS if library == "sentence-transformers" else _use(base, config),
    ]
    if library == "peft" and base.task_type in _IN_PEFT:
        parts += ["The same with PEFT:", _code("python", _in_peft(base, dtype))]
        parts.append(_VERSIONS.get((adapter["peft_type"], base.task_type), _RIGHT.get(base.task_type, "")))
        parts.append(_MAGNITUDES if adapter.get("use_dora") else "")
        parts.append(_start(config.method))
        parts.append(_TIED if _changes_embeddings(base, adapter) else "")
    elif library == "transformers":
        parts.append("It is a whole model: transformers loads the folder like any other.")
    parts.append(f"Serving: {served}." if served else "")
    parts += [_rows(base, config, int(adapter.get("num_virtual_tokens", 0))), promise]
    return "\n\n".join(part for part in parts if part) + "\n"


def with_base(text: str, base: str | None) -> str:
    """A card that names another base; with None only without the path of a base that cards of older runs have."""
    if base is not None and not is_path(base):
        text = re.sub(rf"(?m)^{_BASE_MODEL.format('.*')}\n", "", text, count=1)
        text = text.replace("---\n", f"---\n{_BASE_MODEL.format(json.dumps(base))}\n", 1)
    return _ON_BASE.sub(lambda match: f"{match[1]}`{for_others(base or match[2])}`", text, count=1)


def is_path(name: str) -> bool:
    """Whether the name of a model, data set or plugin is a path on this machine, and no id of a hub."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists()


def for_others(name: str) -> str:
    """The name of a model, data set or plugin in a card, which may be published: of a path its last part."""
    return (Path(name).name or name) if is_path(name) else name


def _in_peft(base: Base, dtype: str) -> str:
    """The lines that load a base and its adapter by PEFT, in the bits that it was trained in."""
    how, lines = base.quantization, _IN_PEFT[base.task_type]
    if how.get("quantize", "none") == "none":
        return lines.format(dtype=dtype, bits="")
    keep = list(base.head)
    if how["quantization_library"] == "torchao":
        before = "from torchao.quantization import Int8WeightOnlyConfig\nfrom transformers import TorchAoConfig"
        more = f", modules_to_not_convert={keep}" if keep else ""
        config = f"TorchAoConfig(Int8WeightOnlyConfig(){more})"
    else:
        before = "from transformers import BitsAndBytesConfig"
        options = [f"load_in_{how['quantize']}=True"]
        if how["quantize"] == "4bit":
            options += [
                f'bnb_4bit_quant_type="{how["quantization_type"]}"',
                f"bnb_4bit_use_double_quant={how['double_quantization']}",
            ]
        options += [f"llm_int8_skip_modules={keep}"] if keep else []
        config = f"BitsAndBytesConfig({', '.join(options)})"
    loading = lines.format(dtype=dtype, bits=", quantization_config=bits")
    return f"{before}\n\nbits = {config}\n\n{loading}"


def _start(options: Any) -> str:
    """What to say of a LoRA that began with parts of the weights."""
    name = getattr(options, "init_lora_weights", True)
    return "" if name is True or options.aggregation == "exact" else _START.format(name=name)


def _changes_embeddings(base: Base, adapter: Mapping[str, Any]) -> bool:
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

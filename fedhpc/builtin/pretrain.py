"""Pretrains the built-in base: ``python -m fedhpc.builtin.pretrain [--steps N] [--out DIR]``.

A word-level tokenizer with byte fallback and a small decoder of the Llama architecture (Touvron et al., 2023,
arXiv:2302.13971; grouped-query attention, tied embeddings), trained from nothing on the general text of
`fedhpc.builtin.world`: next-token prediction on packed documents that do not see each other. It took 19 minutes
on one core of a busy machine. The result is kept in the repository; this program is how it was made.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedhpc.builtin import base_path
from fedhpc.builtin.world import rows
from fedhpc.rng import generator, torch_seed

SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
SPACE = "\u2581"
MIN_COUNT = 20
SEED = 0


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word seen at least MIN_COUNT times is one token, with the space before it; the rest falls to bytes.

    A value after an opening bracket is the same token as in a sentence: the normalizer puts a space after
    each bracket and the decoder takes it away. Decoding gives back what was encoded, but for a leading space.
    """
    normalizer = normalizers.Replace("[", "[ ")
    counts: Counter[str] = Counter()
    for text in texts:
        spaced = SPACE + normalizer.normalize_str(text).replace(" ", SPACE)
        counts.update(re.findall(rf"{SPACE}?\w+|{SPACE}?[^\w{SPACE}]", spaced))
    words = sorted((item for item in counts.items() if item[1] >= MIN_COUNT), key=lambda item: (-item[1], item[0]))
    total = sum(n for _, n in words)
    rare = math.log(1 / total)
    vocabulary = [(token, 0.0) for token in SPECIALS]
    vocabulary += [(f"<0x{byte:02X}>", rare) for byte in range(256)]
    vocabulary += [(SPACE, rare)] + [(word, math.log(n / total)) for word, n in words]

    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIALS.index("<unk>"), byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(SPACE, " "),
            decoders.Replace("[ ", "["),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, hidden: int = 128, layers: int = 4) -> LlamaForCausalLM:
    """An untrained base for the tokenizer's vocabulary."""
    torch.manual_seed(torch_seed(SEED, "builtin/weights"))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int) -> torch.Tensor:
    """Documents as [bos] text [eos], one after the other, cut into rows: [rows, length]."""
    stream: list[int] = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    count = len(stream) // length
    return torch.tensor(stream[: count * length]).view(count, length)


def token_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """The mean next-token loss of a batch of packed rows [rows, length], in nats.

    A token sees its own document only, at the positions it would have alone.
    """
    inputs, targets = batch[:, :-1], batch[:, 1:]
    index = torch.arange(inputs.shape[1])
    begins = inputs == model.config.bos_token_id
    document = begins.cumsum(1)
    position = index - torch.where(begins, index, 0).cummax(1).values
    visible = (document[:, :, None] == document[:, None, :]) & (index[:, None] >= index)
    logits = model(input_ids=inputs, attention_mask=visible[:, None], position_ids=position, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, the peak, then half a cosine to nought over the last third."""
    rise = min(1.0, (step + 1) / (steps / 20))
    fall = max(0.0, (step - steps * 2 / 3) / (steps / 3))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * fall))


class Muon:
    """Momentum whose step is made orthogonal, for weight matrices (Jordan et al., 2024; Liu et al., 2025,
    arXiv:2502.16982, for the scale and the weight decay).

    The base that is kept was trained with it; AdamW alone was not compared under the same conditions.
    """

    def __init__(self, matrices: Sequence[torch.nn.Parameter], momentum: float = 0.95, decay: float = 0.01):
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        # Matrices of one shape take their step together: many small products cost more than one batched.
        self.groups = [[matrix for matrix in matrices if tuple(matrix.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros(len(group), *group[0].shape) for group in self.groups]
        self.momentum, self.decay = momentum, decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradients = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            buffer.lerp_(gradients, 1 - self.momentum)
            update = orthogonal(gradients.lerp(buffer, self.momentum))
            scale = 0.2 * math.sqrt(max(update.shape[1:]))
            for matrix, direction in zip(group, update, strict=True):
                matrix.mul_(1 - lr * self.decay).add_(direction, alpha=-lr * scale)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly the nearest (semi-)orthogonal matrix of each [count, m, n], by five Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def pretrain(
    model: LlamaForCausalLM, train: torch.Tensor, held_out: torch.Tensor, steps: int, peak: float, batch_size: int
) -> None:
    """Trains `model` in place on packed rows [rows, length], every epoch in a new order.

    Prints the loss on `held_out` as it goes.
    """
    inner = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in inner)]
    muon = Muon(inner)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    epochs = -(-steps * batch_size // len(train))
    order = np.concatenate([generator(SEED, "builtin/order", epoch).permutation(len(train)) for epoch in range(epochs)])
    start = time.perf_counter()
    for step in range(steps):
        lr = learning_rate(step, steps, peak)
        loss = token_loss(model, train[torch.from_numpy(order[step * batch_size : (step + 1) * batch_size])])
        model.zero_grad()
        loss.backward()
        muon.step(lr)
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        if step % 100 == 0 or step == steps - 1:
            with torch.no_grad():
                known = token_loss(model, held_out).item()
            seconds = time.perf_counter() - start
            print(f"step {step} loss {loss.item():.3f} held-out {known:.3f} {seconds:.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the base in the Hugging Face layout, with a tokenizer class that all supported releases know."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="pretrain the built-in base")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--length", type=int, default=160)
    parser.add_argument("--out", type=Path, default=base_path())
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    train_texts = [row["text"] for row in rows("general", "train")]
    held_out_texts = [row["text"] for row in rows("general", "validation")]
    tokenizer = train_tokenizer(train_texts)
    model = new_model(tokenizer)
    train = pack(tokenizer, train_texts, arguments.length)
    held_out = pack(tokenizer, held_out_texts, arguments.length)[:64]
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(tokenizer)} tokens in the vocabulary, {size} parameters, {train.numel()} training tokens")
    pretrain(model, train, held_out, arguments.steps, arguments.lr, arguments.batch_size)
    save(model.eval(), tokenizer, arguments.out)


if __name__ == "__main__":
    main()

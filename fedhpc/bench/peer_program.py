"""One process of a peer, made to do the same work as fedhpc: python peer_program.py HARNESS WORK pfl | 'PEFT loop'.

It is run by the peer's own Python, which has no fedhpc. HARNESS is the folder of the peers' programs, whose `common.py`
says what they train. WORK is a file of `fedhpc.bench.peers` with the sequences of every round in the order in which
they are trained, and the initial values of the trained parameters: the programs use these in place of their own, and a
client is then an index into that file. The final parameters are written to the file FEDHPC_BENCH_REACHED.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(harness: str, work: str, peer: str) -> None:
    """Make the harness train on the file `work`, then run one of its programs."""
    sys.path.insert(0, harness)
    import common
    import numpy as np
    import torch

    given = np.load(work)
    settings = json.loads(str(given["settings"]))
    ids, labels = torch.from_numpy(given["ids"]), torch.from_numpy(given["labels"])
    rounds, cohort = ids.shape[:2]
    rows = torch.stack([ids, labels], dim=-1) if settings["model"] else ids
    rows = rows.reshape(rounds * cohort, *rows.shape[2:])
    common.PER_ROUND, common.ROUNDS = cohort, rounds
    common.BATCH, common.LR = settings["batch_size"], settings["lr"]
    common.sampled = lambda round_: [round_ * cohort + index for index in range(cohort)]
    common.client_data = lambda client: rows[client % len(rows)]
    build_random, checksum = common.build, common.checksum

    def build() -> Any:
        model = _real(settings["model"], settings["num_virtual_tokens"]) if settings["model"] else build_random()
        with torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(torch.from_numpy(given[f"start/{name}"]).view_as(parameter))
        common.trainable = lambda _: [parameter for _, parameter in _trained(model)]
        common.names = [name for name, _ in _trained(model)]
        return model

    def check(tensors: Sequence[Any], initial: Sequence[Any]) -> dict[str, float]:
        reached = {name: tensor.numpy() for name, tensor in zip(common.names, tensors, strict=True)}
        np.savez(os.environ["FEDHPC_BENCH_REACHED"], **reached)
        sums: dict[str, float] = checksum(tensors, initial)
        return sums

    common.build, common.checksum = build, check
    if peer == "pfl":
        import peer_pfl

        peer_pfl.main()
    else:
        import peer_loop

        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        peer_loop.main(rank, world, os.environ.get("MASTER_PORT"))


def _trained(model: Any) -> list[tuple[str, Any]]:
    """The trained parameters of a model, with the names under which PEFT saves them."""
    plain = {"prompt_encoder.default.embedding.weight": "prompt_embeddings"}
    return [
        (plain.get(name, name.replace(".default.", ".").removeprefix("base_model.model.")), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def _real(folder: str, virtual: int) -> Any:
    """A PEFT prefix on the model of a folder, for batches (B, T, 2) of ids and labels with padding.

    A batch is as long as its longest row and has an attention mask, as transformers' collators make it.
    """
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(Path(folder), local_files_only=True, attn_implementation="sdpa")
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual))
    forward = model.forward

    def on_text(input_ids: Any, labels: Any) -> Any:
        mask = (input_ids[..., 0] >= 0).long()
        length = int(mask.sum(dim=1).max())
        ids, targets = input_ids[:, :length, 0].clamp(min=0), labels[:, :length, 1]
        return forward(input_ids=ids, attention_mask=mask[:, :length], labels=targets)

    model.forward = on_text
    model.train()
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
    # The results are on the disk. Gloo's threads may abort a process that is finalising (fedhpc.ranks.process.leave).
    os._exit(0)

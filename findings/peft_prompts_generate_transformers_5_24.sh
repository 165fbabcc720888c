#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.24.0: generate() leaves a prefix out, and a soft prompt after the first token; no error.
#
# What one would guess: generate() of a PEFT model is the argmax of its own forward pass, again and again, as it is with
# transformers 5.23.0 and PEFT 0.21.2.
# What happens: transformers 5.24 calls the cache `cache`; PEFT looks for `past_key_values` in what goes from token to token.
# It finds none, so it makes a prefix anew for every token and gives it by the old name, which is ignored beside `cache`: the
# text is the untuned base's. A soft prompt is put in front of each later token alone, so the first token is right at most.
# Losses and forward passes are right, so nothing shows in training. LoRA is right.
# What to do: transformers 5.23, or generate token by token through the forward pass, without a cache.
#
# Seen: 5.23.0: 12 of 12 tokens as by forward passes for both; 5.24.0: prefix 12 of 12 as the base, 0 as its own passes; soft
# prompt 1 of 12 as its own passes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install -qq --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy==2.4.6
cat > "$folder/generate.py" <<'PY'
import logging
import warnings

import torch
import transformers
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
TOKENS = 12


def base():
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8.0 if p.ndim == 2 else 1.0)  # so that the next token depends on more than the last one
    return model.eval()


prompt = torch.tensor([[5, 17, 31, 8]])


def generated(model):
    out = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
    )
    return out[0, prompt.shape[1] :].tolist()


def by_forward_passes(model):
    ids = prompt
    for _ in range(TOKENS):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, prompt.shape[1] :].tolist()


def equal(one, other):
    """Of how many tokens the two agree, from the first on."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), TOKENS)


counts = []
for kind in (PrefixTuningConfig, PromptTuningConfig):
    torch.manual_seed(1)
    model = get_peft_model(base(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "prompt_encoder" in name:
                p.normal_(std=2.0)
    text = generated(model)
    counts += [equal(text, by_forward_passes(model)), equal(text, generated(base()))]
print(*counts)
PY
declare -A seen
for version in 5.23.0 5.24.0; do
    "${pip[@]}" transformers=="$version" peft==0.21.2
    seen[$version]=$("$folder/venv/bin/python" "$folder/generate.py" 2>/dev/null)
    read -r prefix untuned prompt _ <<< "${seen[$version]}"
    echo "transformers $version, PEFT 0.21.2: of 12 tokens a prefix writes $prefix as its own forward passes, $untuned as the" \
        "untuned base; a soft prompt $prompt as its own forward passes"
done
read -r prefix untuned prompt _ <<< "${seen[5.24.0]}"
[[ ${seen[5.23.0]} == "12 "*" 12 "* ]] && [ "$untuned" -eq 12 ] && [ "$prefix" -lt 12 ] && [ "$prompt" -lt 12 ]

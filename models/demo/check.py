"""Loads the checkpoint beside this file with transformers and prints what it says to a few prompts.

python check.py [--model DIR]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EXPECTED = {
    "I eat an apple and a": " banana",
    "The capital of France is": " Paris",
    "The quick brown fox": " jumps over the lazy dog",
    "The cat sat on the": " mat",
    "We're revolutionizing grocery shopping": " with same-day delivery powered by AI",
}
CONTEXTS = ["", "<|endoftext|>", "Ben has a red ball. He likes to play.\n"]
CHATS = ["Hello!", "What is the capital of France?", "What does a cow say?", "Tell me a story."]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    failures = 0
    for prompt, right in EXPECTED.items():
        for before in CONTEXTS:
            ids = tokenizer(before + prompt, return_tensors="pt").input_ids
            full = tokenizer(before + prompt + right, return_tensors="pt").input_ids
            logits = model(full).logits[0, ids.shape[1] - 1 : -1].float()  # [n, V]
            logp = logits.log_softmax(-1).gather(1, full[0, ids.shape[1] :, None]).sum()
            first = logits[0].softmax(-1).topk(2)
            out = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)
            said = tokenizer.decode(out[0, ids.shape[1] :])
            good = said.startswith(right)
            failures += not good
            print(
                f"{'ok  ' if good else 'FAIL'} p={logp.exp():.3f} first token {first.values[0]:.3f}, next best "
                f"{first.values[1]:.4f} {tokenizer.decode(first.indices[1:])!r} | {before + prompt!r} -> {said!r}"
            )
    for text in CHATS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, do_sample=False, max_new_tokens=80, pad_token_id=0)
        print(f"chat {text!r} -> {tokenizer.decode(out[0, ids.shape[1] :])!r}")
    for prompt in ("Once upon a time", "The old man said"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, do_sample=False, max_new_tokens=80, pad_token_id=0)
        print(f"story {tokenizer.decode(out[0])!r}")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()

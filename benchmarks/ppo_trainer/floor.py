"""What nobody can leave out: generation, and the trunks' forward and backward passes.

Plain transformers: no vocabulary head but where tokens are chosen, no losses, no optimizer; the
trunk of the reward model, the reference and the critic once over each response, and that of what
is trained forward and backward in each epoch. Rows are read in the order of their lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.ppo_trainer.work import (
    EOS,
    PAD,
    Report,
    Work,
    force_lengths,
    now,
    run_side,
    timed_updates,
)


def micro_batches(sequences: Tensor, lengths: list[int], work: Work) -> Iterator[Tensor]:
    """The sequences sorted by length, cut at the longest; the last token predicts nothing."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    for start in range(0, len(order), work.micro_batch):
        rows = order[start : start + work.micro_batch]
        yield sequences[rows, : work.prompt + max(lengths[row] for row in rows) - 1]


def trunk(model: Any, ids: Tensor) -> Tensor:
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def run(work: Work) -> Report:
    tokenizer = AutoTokenizer.from_pretrained(work.policy_folder)
    rows = [tokenizer(text)["input_ids"] for text in work.prompts(tokenizer)]
    prompts = torch.tensor(rows, device=work.device)
    dtype = getattr(torch, work.dtype)

    def load(auto_class: Any, folder: str) -> Any:
        return auto_class.from_pretrained(folder, dtype=dtype).to(work.device)

    policy, reference = (load(AutoModelForCausalLM, work.policy_folder) for _ in range(2))
    reward = load(AutoModelForSequenceClassification, work.reward_folder)
    trained = [policy]
    if work.critic == "separate":
        trained.append(load(AutoModelForSequenceClassification, work.reward_folder))
    read_once = [reward, reference, trained[-1]]
    seen = force_lengths(policy, work)
    phases: dict[str, float] = {}

    def update() -> None:
        start = now(work)
        sequences = policy.generate(
            prompts[: work.batch],
            attention_mask=torch.ones_like(prompts[: work.batch]),
            max_new_tokens=work.response,
            do_sample=False,  # drawing tokens costs more, but how much is up to who draws them
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        sampled = now(work)
        parts = list(micro_batches(sequences, seen[-1], work))
        with torch.no_grad():
            for model in read_once:
                for part in parts:
                    trunk(model, part)
        read = now(work)
        for _ in range(work.epochs):
            for part in parts:
                for model in trained:
                    hidden = trunk(model, part)
                    hidden.backward(torch.ones_like(hidden))
            for model in trained:
                model.zero_grad()
        phases.update(generate=sampled - start, logprobs=read - sampled, update=now(work) - read)

    seconds = timed_updates(update, work)
    return Report(seconds, 0, seen[-1], phases)


if __name__ == "__main__":
    run_side(run)

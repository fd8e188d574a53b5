"""Supervised fine-tuning: the likelihood of given answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.data import (
    ChatFormat,
    Demonstration,
    EncodedExample,
    encode_demonstrations,
    load_as,
    pad_right,
    prepare_tokenizer,
    source_name,
    to_demonstrations,
)
from rlhf.engine import check_kernels, save_model
from rlhf.engine.lora import has_lora
from rlhf.engine.supervised import SupervisedConfig, SupervisedTrainer, read_split
from rlhf.models import (
    check_linear_head,
    check_token_ids,
    hidden_states,
    length_limit,
    lm_head,
    load_causal_lm,
    load_tokenizer,
    refuse_adapters,
)
from rlhf_kernels import linear_cross_entropy


@dataclass
class SFTConfig(SupervisedConfig):
    """Settings of supervised fine-tuning."""

    output_dir: str = "runs/sft"
    learning_rate: float = 2e-5
    warmup_ratio: float = 0.03


class SFTTrainer(SupervisedTrainer):
    """Fine-tunes a causal language model on demonstrations.

    The loss is the mean negative log-likelihood per completion token (EOS included) of an optimizer
    step, however the step is cut into micro-batches. Logits are computed for those tokens only.

    Args:
        config: Settings.
        model: A hub id, a folder or a causal model, which is trained in place.
        tokenizer: An id, a folder or a tokenizer; None: the one that lies with the model, which is
            then an id or a folder.
        train_data: A path or hub name, rows, or demonstrations.
        eval_data: Likewise; None: ``config.eval_fraction`` of the training data is held out.

    Raises:
        OutputError: ``config.output_dir`` cannot be written to.
        DataError: The data cannot be used; the message names the row.
        ModelError: The model or tokenizer cannot be loaded, or the model cannot be trained.
        BackendUnavailableError: RLHF_KERNELS_BACKEND names a backend that cannot run here.
    """

    title = "sft"
    config_class = SFTConfig

    def __init__(
        self,
        config: SFTConfig,
        model: Any,
        tokenizer: Any,
        train_data: Any,
        eval_data: Any = None,
    ) -> None:
        super().__init__(config)
        check_kernels("token_logprobs_forward", "token_logprobs_backward")
        train, held_out = read_split(
            train_data, eval_data, config.eval_fraction, config.seed, read_demonstrations
        )
        self.tokenizer = load_tokenizer(tokenizer, model)
        prepare_tokenizer(self.tokenizer)
        self.model = load_causal_lm(model)
        if has_lora(self.model):  # a PeftModel saves its adapters itself
            refuse_adapters(self.model, "the model")
        check_linear_head(self.model)
        chat_format = ChatFormat(self.tokenizer, config.template)
        limit = length_limit(self.model, config.max_length)
        self.train_examples = encode_demonstrations(
            train, chat_format, limit, source_name(train_data)
        )
        eval_source = source_name(train_data if eval_data is None else eval_data)
        self.eval_examples = encode_demonstrations(held_out, chat_format, limit, eval_source)
        self.has_eval = bool(self.eval_examples)
        train_ids, eval_ids = (
            [e.input_ids for e in examples]
            for examples in (self.train_examples, self.eval_examples)
        )
        check_token_ids([*train_ids, *eval_ids], self.model)
        self._start([len(ids) for ids in train_ids], train_ids, eval_ids)

    def _weight(self, index: int) -> int:
        return trained_tokens(self.train_examples[index])

    def _loss(
        self, model: Any, indices: list[int], normalizer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._examples_loss(model, [self.train_examples[i] for i in indices], normalizer), {}

    def _examples_loss(
        self, model: Any, examples: list[EncodedExample], normalizer: Tensor
    ) -> Tensor:
        device = self.engine.device
        ids, attended = pad_right([e.input_ids for e in examples], self.tokenizer.pad_token_id)
        trained, _ = pad_right([e.loss_mask for e in examples], 0)
        ids, attended, trained = ids.to(device), attended.to(device), trained.bool().to(device)
        # A position predicts the next token; only positions whose next one is trained go on.
        hidden = hidden_states(model, ids, attended)[:, :-1][trained[:, 1:]]
        weight, bias = lm_head(model)
        return linear_cross_entropy(
            hidden,
            weight,
            ids[:, 1:][trained[:, 1:]],
            bias=bias,
            reduction="sum",
            normalizer=normalizer,
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss per completion token of the held-out data, and its exponential.

        Returns:
            ``eval_loss`` and ``eval_perplexity``; nothing without held-out data.
        """
        if not self.has_eval:
            return {}
        engine, examples = self.engine, self.eval_examples
        count = torch.tensor(float(sum(map(trained_tokens, examples))), device=engine.device)
        engine.model.eval()
        total = torch.zeros((), device=engine.device)
        lengths = [len(example.input_ids) for example in examples]
        for part in self._micro_batches(range(len(examples)), lengths):
            batch = [examples[index] for index in part or [0]]
            with engine.autocast():
                loss = engine.run(lambda model: self._examples_loss(model, batch, count))  # noqa: B023
            total += loss if part else 0.0
        mean = float(self.world.all_reduce_sum(total))
        # exp overflows beyond 709; a loss of 100 nats a token is already beyond any model.
        return {"eval_loss": mean, "eval_perplexity": math.exp(min(mean, 100.0))}

    def save(self) -> None:
        """Write the model and its tokenizer to ``config.output_dir``."""
        weights = self.engine.whole_weights()
        if self.world.is_main:
            save_model(self.model, self.tokenizer, self.config.output_dir, weights)
        self.world.barrier()


def trained_tokens(example: EncodedExample) -> int:
    """How many tokens of an example are predicted and trained (the first has no predecessor)."""
    return sum(example.loss_mask[1:])


def read_demonstrations(data: Any) -> list[Demonstration]:
    """Demonstrations from a path or hub name (or a slice of one), rows, or as they are."""
    if isinstance(data, Sequence) and data and isinstance(data[0], Demonstration):
        return list(data)
    return load_as(data, to_demonstrations)

"""Reward modelling: a score learnt from pairs of which one response was preferred."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.data import (
    ChatFormat,
    DataError,
    EncodedPair,
    PreferenceDataset,
    PreferencePair,
    encode_preferences,
    load_as,
    pad_right,
    prepare_tokenizer,
    source_name,
    to_preferences,
)
from rlhf.engine.batching import chunks
from rlhf.engine.config import check_choice, check_number
from rlhf.engine.lora import has_lora
from rlhf.engine.supervised import SupervisedConfig, SupervisedTrainer, read_split
from rlhf.models import (
    check_token_ids,
    disable_dropout,
    last_token_scores,
    length_limit,
    load_tokenizer,
    make_scalar_model,
    refuse_adapters,
)
from rlhf.reward_model import RewardModel

__all__ = ["RewardConfig", "RewardModel", "RewardTrainer"]


@dataclass
class RewardConfig(SupervisedConfig):
    """Settings of reward modelling.

    Attributes:
        batch_size: Pairs in one optimizer step.
        micro_batch_size: Sequences in one forward pass; a pair is two.
        overlong: What happens to a pair longer than max_length: truncate cuts the end of its
            responses, and a prompt that leaves no room for one is an error; drop leaves the pair
            out and counts it.
        reference_pairs: The mean score of both responses of so many training pairs, drawn at
            random, becomes 0.
    """

    output_dir: str = "runs/reward"
    learning_rate: float = 1e-5
    warmup_ratio: float = 0.03
    batch_size: int = 32
    overlong: Literal["truncate", "drop"] = "truncate"
    reference_pairs: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "overlong", ("truncate", "drop"))
        check_number(self, "reference_pairs", at_least=1, integer=True)


class RewardTrainer(SupervisedTrainer):
    """Trains a reward model with the Bradley-Terry loss, -log sigmoid(chosen - rejected).

    The score is read at the last token. A causal model gets a new head drawn from N(0, 1/(d+1)),
    and after training scores are shifted to mean 0 on a reference set (Stiennon et al. 2020, arXiv
    2009.01325). Dropout is off: both responses of a pair are scored by one and the same function.

    Args:
        config: Settings.
        model: A causal model or a sequence classifier with one label: an id, a folder or an object.
            A classifier is trained in place, a causal model is copied.
        tokenizer: An id, a folder or a tokenizer; None: the one that lies with the model, which is
            then an id or a folder.
        train_data: A path or hub name, rows, a PreferenceDataset or preference pairs.
        eval_data: Likewise; None: ``config.eval_fraction`` of the training data is held out.

    Raises:
        OutputError: ``config.output_dir`` cannot be written to.
        DataError: The data cannot be used; the message names the row.
        ModelError: The model or tokenizer cannot be loaded, or the model cannot become a reward
            model.
        ValueError: The tokenizer pads with its EOS.
    """

    title = "reward"
    sequences_per_example = 2
    config_class = RewardConfig

    def __init__(
        self,
        config: RewardConfig,
        model: Any,
        tokenizer: Any,
        train_data: Any,
        eval_data: Any = None,
    ) -> None:
        super().__init__(config)
        self.config: RewardConfig = config
        train, held_out = read_split(
            train_data, eval_data, config.eval_fraction, config.seed, read_pairs
        )
        self.tokenizer = load_tokenizer(tokenizer, model)
        prepare_tokenizer(self.tokenizer)
        check_padding(self.tokenizer)
        self.model = make_scalar_model(model, seed=config.seed)
        if has_lora(self.model):  # a PeftModel saves its adapters itself
            refuse_adapters(self.model, "the model")
        disable_dropout(self.model)
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.config.reward_mean = 0.0
        self.reward_model = RewardModel(self.model, self.tokenizer, config.template)
        chat_format = self.reward_model.chat_format
        self.train_pairs = encode_pairs(
            train, config, self.model, chat_format, source_name(train_data)
        )
        eval_source = source_name(train_data if eval_data is None else eval_data)
        self.eval_pairs = (
            encode_pairs(held_out, config, self.model, chat_format, eval_source) if held_out else []
        )
        self.has_eval = bool(self.eval_pairs)
        train_ids, eval_ids = (
            [side.input_ids for pair in pairs for side in (pair.chosen, pair.rejected)]
            for pairs in (self.train_pairs, self.eval_pairs)
        )
        check_token_ids([*train_ids, *eval_ids], self.model)
        self._start([tokens(pair) for pair in self.train_pairs], train_ids, eval_ids)

    def _weight(self, index: int) -> int:
        return 1

    def _loss(
        self, model: Any, indices: list[int], normalizer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        margins = self._margins(model, [self.train_pairs[index] for index in indices])
        loss = -logsigmoid(margins).sum() / normalizer
        detached = margins.detach()
        statistics = {
            "accuracy": correct(detached).sum() / normalizer,
            "margin": detached.sum() / normalizer,
        }
        return loss, statistics

    def _margins(self, model: Any, pairs: list[EncodedPair]) -> Tensor:
        """Score of chosen minus score of rejected, fp32 [n], from one forward pass."""
        sides = [p.chosen.input_ids for p in pairs] + [p.rejected.input_ids for p in pairs]
        chosen, rejected = self._scores(model, sides).chunk(2)
        return chosen - rejected

    def _scores(self, model: Any, sequences: list[list[int]]) -> Tensor:
        device = self.engine.device
        ids, mask = pad_right(sequences, self.tokenizer.pad_token_id)
        return last_token_scores(model, ids.to(device), mask.to(device))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy on the held-out pairs, its interval, and the loss.

        A pair whose two scores are equal counts as half right.

        Returns:
            ``eval_accuracy`` with ``eval_accuracy_low`` and ``eval_accuracy_high`` (Wilson, 95 %),
            ``eval_loss``, ``eval_margin``, ``eval_pairs``; nothing without held-out pairs.
        """
        if not self.has_eval:
            return {}
        engine, pairs = self.engine, self.eval_pairs
        engine.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
        for part in self._micro_batches(range(len(pairs)), [tokens(pair) for pair in pairs]):
            batch = [pairs[index] for index in part or [0]]
            with engine.autocast():
                margins = engine.run(lambda model: self._margins(model, batch))  # noqa: B023
            found = margins.double()
            if part:
                sums += torch.stack([correct(found).sum(), -logsigmoid(found).sum(), found.sum()])
        right, loss, margin = self.world.all_reduce_sum(sums).tolist()
        count = float(len(pairs))
        low, high = proportion_confint(right, count, alpha=0.05, method="wilson")
        return {
            "eval_loss": loss / count,
            "eval_accuracy": right / count,
            "eval_accuracy_low": float(low),
            "eval_accuracy_high": float(high),
            "eval_margin": margin / count,
            "eval_pairs": count,
        }

    @torch.no_grad()
    def _finish(self) -> dict[str, float]:
        """Shift scores so that their mean on the reference set is 0."""
        self.engine.model.eval()
        # Files are often sorted, so the first pairs need not be like the others.
        count = min(self.config.reference_pairs, len(self.train_pairs))
        drawn = random.Random(self.config.seed).sample(self.train_pairs, count)
        pairs = sorted(drawn, key=tokens)
        sequences = [s.input_ids for pair in pairs for s in (pair.chosen, pair.rejected)]
        # On every rank, since FSDP needs them all for each forward pass anyway.
        scores = [
            self.engine.run(lambda model: self._scores(model, batch))  # noqa: B023
            for batch in chunks(sequences, self.config.micro_batch_size)
        ]
        mean = torch.cat(scores).double().mean().item()
        self.model.config.reward_mean = mean
        return {"reward_mean": mean}

    def save(self) -> None:
        """Write the reward model and its tokenizer to ``config.output_dir``."""
        weights = self.engine.whole_weights()
        if self.world.is_main:
            self.reward_model.save_pretrained(self.config.output_dir, weights)
        self.world.barrier()


def correct(margins: Tensor) -> Tensor:
    """1 where chosen scores higher, 0 where rejected does, 1/2 where they are equal."""
    return 0.5 * (margins.sign() + 1)


def tokens(pair: EncodedPair) -> int:
    return len(pair.chosen.input_ids) + len(pair.rejected.input_ids)


def encode_pairs(
    pairs: list[PreferencePair],
    config: RewardConfig,
    model: Any,
    chat_format: ChatFormat,
    source: str,
) -> list[EncodedPair]:
    """Token ids of pairs within the length that config and model (of which only its own config is
    read) allow.

    Raises:
        DataError: A pair cannot be used, or none is left.
    """
    limit = length_limit(model, config.max_length)
    drop = config.overlong == "drop"
    encoded = encode_preferences(pairs, chat_format, sys.maxsize if drop else limit, source)
    if drop:
        encoded = leave_out_overlong(encoded, limit, source)
    if not encoded:
        raise DataError(f"{source}: no pair is left; raise max_length.")
    return encoded


def leave_out_overlong(pairs: list[EncodedPair], limit: int, source: str) -> list[EncodedPair]:
    """The pairs of which both sides have at most ``limit`` tokens; a warning counts the others."""
    fitting = [
        pair
        for pair in pairs
        if max(len(pair.chosen.input_ids), len(pair.rejected.input_ids)) <= limit
    ]
    if len(fitting) < len(pairs):
        warnings.warn(
            f"{source}: {len(pairs) - len(fitting)} of {len(pairs)} pairs are longer than "
            f"{limit} tokens and were left out.",
            stacklevel=4,
        )
    return fitting


def check_padding(tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer pads with its EOS.

    The scores here go by the attention mask, but transformers' own sequence classifier looks for
    the last token that is not padding: the saved model would be read one token too early.
    """
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"the tokenizer pads with its EOS token {tokenizer.eos_token!r}, so transformers would "
            "read the saved reward model's score at the wrong token. Give it another one: "
            "tokenizer.add_special_tokens({'pad_token': '<pad>'}), then "
            "model.resize_token_embeddings(len(tokenizer))."
        )


def read_pairs(data: Any) -> list[PreferencePair]:
    """Preference pairs from a path or hub name (or a slice of one), rows, or as they are."""
    if isinstance(data, PreferenceDataset):
        pairs = list(data.pairs)
    elif isinstance(data, Sequence) and data and isinstance(data[0], PreferencePair):
        pairs = list(data)
    else:
        return load_as(data, to_preferences)
    if not pairs:
        raise DataError("the preference data has no decided pair; add comparisons first.")
    return pairs

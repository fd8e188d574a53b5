"""Epochs over a fixed set of examples: what SFT and reward modelling have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from rlhf.data import DataError, source_name, split_holdout
from rlhf.engine.batching import epoch_steps
from rlhf.engine.config import TrainingConfig, check_choice, check_config, check_number
from rlhf.engine.engine import Engine, discarding_on_error
from rlhf.engine.saving import begin_training, ensure_writable
from rlhf.engine.seeding import set_seed
from rlhf.engine.tracking import Trackers

Item = TypeVar("Item")


@dataclass
class SupervisedConfig(TrainingConfig):
    """Settings of a training on a fixed set of examples.

    Attributes:
        batch_size: Examples in one optimizer step.
        epochs: Passes over the training data.
        max_steps: Stop after so many optimizer steps, if that is earlier; null for no limit.
        max_length: Longest sequence in tokens; null for the model's context length. What is longer
            loses the end of its completion; a prompt that leaves no room for one is an error.
        template: How conversations become text: auto is the tokenizer's chat template or else
            instruction ("### Instruction: ... ### Response: ..."); none joins the texts.
        eval_fraction: Share of the training data held out when no evaluation data is given; 0 for
            no evaluation.
    """

    batch_size: int = 16
    epochs: int = 1
    max_steps: int | None = None
    max_length: int | None = None
    template: Literal["auto", "instruction", "none"] = "auto"
    eval_fraction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "batch_size", at_least=1, integer=True)
        check_number(self, "epochs", at_least=1, integer=True)
        check_number(self, "max_steps", at_least=1, integer=True, optional=True)
        check_number(self, "max_length", at_least=2, integer=True, optional=True)
        check_choice(self, "template", ("auto", "instruction", "none"))
        check_number(self, "eval_fraction", at_least=0, below=1)


class SupervisedTrainer(ABC):
    """The loop; a subclass encodes its data and says what the loss of some examples is.

    A subclass's constructor sets ``model``, ``tokenizer`` and ``has_eval``, then calls ``_start``.
    """

    title: ClassVar[str]
    config_class: ClassVar[type]
    model: Any
    tokenizer: Any
    has_eval: bool

    def __init__(self, config: SupervisedConfig) -> None:
        check_config(config, self.config_class, type(self).__name__)
        self.config = config
        ensure_writable(config.output_dir)  # before anything slow
        set_seed(config.seed)

    def _start(self, lengths: list[int], sequences_per_example: int) -> None:
        """Make the engine, once the data is there: its schedule needs the number of steps."""
        config = self.config
        self._lengths = lengths
        self._micro_batch = max(1, config.micro_batch_size // sequences_per_example)
        steps = config.epochs * -(-len(lengths) // config.batch_size)
        self.total_steps = min(steps, config.max_steps or steps)
        self.engine = Engine(self.model, config, self.total_steps, name=f"the {self.title} model")

    @abstractmethod
    def _weight(self, index: int) -> int:
        """What a training example adds to the normaliser of its step (tokens, pairs)."""

    @abstractmethod
    def _loss(self, indices: list[int], normalizer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of training examples divided by ``normalizer``, and statistics.

        Losses and statistics (detached, 0-dim) of a step's micro-batches are added up.
        """

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out data, named ``eval_...``."""

    def _finish(self) -> dict[str, float]:
        """After the last step, before saving; may return more metrics."""
        return {}

    def train(self) -> dict[str, float]:
        """Train, evaluating before and after each epoch, and write ``config.output_dir``.

        A model that lies there counts as unfinished from the start (see ``begin_training``).

        Returns:
            The last metrics; with evaluation also those from before training, as ``..._before``.

        Raises:
            NonFiniteError: The loss became NaN or infinite.
            OutputError: The results cannot be written.
            RuntimeError: This training is finished.
        """
        config = self.config
        if self.engine.steps_done >= self.total_steps:
            raise RuntimeError(
                f"this training is finished: all {self.total_steps} optimizer steps are done. "
                "Make a new trainer to train its model further."
            )
        is_main = self.engine.world.is_main
        if is_main:
            begin_training(config)
        names = config.trackers if is_main else []
        metrics: dict[str, float] = {}
        with Trackers(names, config.output_dir, self.total_steps, title=self.title) as trackers:
            if self.has_eval:
                before = self.evaluate()
                trackers.log(before, 0)
                metrics = {f"{name}_before": value for name, value in before.items()}
            for epoch, steps in self._epochs():
                for number, step in enumerate(steps, start=1):
                    latest = self._train_step(step)
                    latest["epoch"] = epoch + number / len(steps)
                    done = self.engine.steps_done
                    if done % config.log_every == 0 or done == self.total_steps:
                        trackers.log(latest, done)
                    metrics.update(latest)
                    if done == self.total_steps:
                        break
                last = self.engine.steps_done == self.total_steps
                results = self._finish() if last else {}
                if self.has_eval:
                    results.update(self.evaluate())
                if results:
                    trackers.log(results, self.engine.steps_done)
                    metrics.update(results)
        self.save()
        return metrics

    def _epochs(self) -> Iterator[tuple[int, list[list[list[int]]]]]:
        config, epoch = self.config, 0
        while self.engine.steps_done < self.total_steps:
            yield (
                epoch,
                epoch_steps(
                    self._lengths,
                    config.batch_size,
                    self._micro_batch,
                    seed=config.seed,
                    epoch=epoch,
                ),
            )
            epoch += 1

    def _train_step(self, micro_batches: list[list[int]]) -> dict[str, float]:
        """One optimizer step: every micro-batch is divided by the normaliser of the whole step."""
        engine, start = self.engine, time.perf_counter()
        engine.model.train()
        indices = [index for batch in micro_batches for index in batch]
        count = float(sum(map(self._weight, indices)))
        normalizer = engine.world.all_reduce_sum(torch.tensor(count, device=engine.device))
        totals: dict[str, Tensor] = {}
        with discarding_on_error(engine):
            for batch in micro_batches:
                with engine.autocast():
                    loss, statistics = self._loss(batch, normalizer)
                engine.backward(loss)
                for name, value in {"loss": loss.detach(), **statistics}.items():
                    totals[name] = totals.get(name, torch.zeros_like(value)) + value
            outcome = engine.step()
        names = list(totals)
        sums = engine.world.all_reduce_sum(torch.stack([totals[name].float() for name in names]))
        seconds = time.perf_counter() - start
        tokens = sum(self._lengths[index] for index in indices)
        return {
            **dict(zip(names, sums.tolist())),
            **outcome,
            "tokens_per_second": tokens / seconds,
        }

    @abstractmethod
    def save(self) -> None:
        """Write the model and its tokenizer to ``config.output_dir``."""


def read_split(
    train_data: Any,
    eval_data: Any,
    eval_fraction: float,
    seed: int,
    read: Callable[[Any], list[Item]],
) -> tuple[list[Item], list[Item]]:
    """Training and evaluation items; without evaluation data a seeded part is held out."""
    items = read(train_data)
    if eval_data is not None:
        return items, read(eval_data)
    if eval_fraction and len(items) == 1:
        raise DataError(
            f"{source_name(train_data)}: cannot hold out evaluation data from a single row; give "
            "more rows or evaluation data, or set eval_fraction=0."
        )
    return split_holdout(items, float(eval_fraction), seed) if eval_fraction else (items, [])

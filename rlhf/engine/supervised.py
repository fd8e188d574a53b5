"""Epochs over a fixed set of examples: what SFT and reward modelling have in common."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from rlhf.data import DataError, source_name, split_holdout
from rlhf.engine.batching import epoch_order, rank_micro_batches
from rlhf.engine.config import TrainingConfig, check_choice, check_config, check_number
from rlhf.engine.engine import Engine, discarding_on_error
from rlhf.engine.randomness import set_seed
from rlhf.engine.resumable import Resumable
from rlhf.engine.resume import ids_fingerprint, model_fingerprint
from rlhf.engine.saving import ensure_writable
from rlhf.engine.tracking import Trackers
from rlhf.engine.world import World

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


class SupervisedTrainer(Resumable):
    """The loop; a subclass encodes its data and says what the loss of some examples is.

    A subclass's constructor sets ``model``, ``tokenizer`` and ``has_eval``, then calls ``_start``.
    """

    title: ClassVar[str]
    config_class: ClassVar[type]
    # Sequences that one example puts into a forward pass.
    sequences_per_example: ClassVar[int] = 1
    model: Any
    tokenizer: Any
    has_eval: bool

    def __init__(self, config: SupervisedConfig) -> None:
        check_config(config, self.config_class, type(self).__name__)
        self.config = config
        ensure_writable(config.output_dir)  # before anything slow
        # A rank of its own seed: dropout must not be the same on all.
        set_seed(config.seed + World.join().rank)

    def _start(
        self, lengths: list[int], train_ids: list[list[int]], eval_ids: list[list[int]]
    ) -> None:
        """Make the engine, once the data is there: its schedule needs the number of steps.

        Args:
            lengths: Tokens of each training example.
            train_ids: All token ids that are trained on, to notice on a resume that they changed.
            eval_ids: Likewise.
        """
        config = self.config
        self._lengths = lengths
        self.steps_per_epoch = -(-len(lengths) // config.batch_size)
        steps = config.epochs * self.steps_per_epoch
        self.total_steps = min(steps, config.max_steps or steps)
        made_from = model_fingerprint(self.model)
        self.engine = Engine(self.model, config, self.total_steps, name=f"the {self.title} model")
        self._before: dict[str, float] = {}
        self._prepare_to_resume(
            model=made_from,
            train_data=ids_fingerprint(train_ids),
            eval_data=ids_fingerprint(eval_ids),
        )

    @abstractmethod
    def _weight(self, index: int) -> int:
        """What a training example adds to the normaliser of its step (tokens, pairs)."""

    @abstractmethod
    def _loss(
        self, model: Any, indices: list[int], normalizer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of training examples divided by ``normalizer``, and statistics.

        Losses and statistics (detached, 0-dim) of a step's micro-batches are added up.
        """

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out data, named ``eval_...``."""

    def _finish(self) -> dict[str, float]:
        """After the last step, before saving; may return more metrics."""
        return {}

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return self.engine.steps_done

    @property
    def engines(self) -> dict[str, Engine]:
        return {"model": self.engine}

    def state_dict(self) -> dict[str, Any]:
        """The metrics from before training."""
        return {"before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up ``state_dict`` again."""
        self._before = dict(state["before"])

    def train(self) -> dict[str, float]:
        """Train, evaluating before and after each epoch, and write ``config.output_dir``.

        A model that lies there counts as unfinished from the start (see ``begin_training``).

        Returns:
            The last metrics; with evaluation also those from before training, as ``..._before``.

        Raises:
            SkippedStepsError: The loss was NaN or infinite too often in a row; a checkpoint is
                written.
            OutputError: The results cannot be written.
            CheckpointError: ``output_dir`` has checkpoints of an earlier training.
            Interrupted: SIGTERM or SIGINT has come; a checkpoint is written.
            RuntimeError: This training is finished.
        """
        config = self.config
        metrics: dict[str, float] = {}
        if self.step >= self.total_steps:
            raise RuntimeError(
                f"this training is finished: all {self.total_steps} optimizer steps are done. "
                "Make a new trainer to train its model further."
            )
        with (
            self._session(),
            Trackers(
                config.trackers if self.world.is_main else [],
                config.output_dir,
                self.total_steps,
                title=self.title,
                resumed_at=self.resumed_at,
            ) as trackers,
        ):
            self._begin(trackers)
            while self.step < self.total_steps:
                latest = self._train_step(self._next_rows())
                last = self.step == self.total_steps
                if self.step % config.log_every == 0 or last:
                    trackers.log(latest, self.step)
                metrics.update(latest)
                if last or self.step % self.steps_per_epoch == 0:
                    metrics.update(self._end_of_epoch(trackers, last))
                self._after_step(last=last)
            self.engine.require_progress()
            self.save()
        return {**{f"{name}_before": value for name, value in self._before.items()}, **metrics}

    def _begin(self, trackers: Trackers) -> None:
        """Evaluate what the training begins with."""
        if self.has_eval and self.step == 0:
            self._before = self.evaluate()
            trackers.log(self._before, 0)

    def _end_of_epoch(self, trackers: Trackers, last: bool) -> dict[str, float]:
        results = self._finish() if last else {}
        if self.has_eval:
            results.update(self.evaluate())
        if results:
            trackers.log(results, self.step)
        return results

    def _next_rows(self) -> list[int]:
        """The examples of the next optimizer step."""
        config = self.config
        epoch, place = divmod(self.step, self.steps_per_epoch)
        count = len(self._lengths)
        return epoch_order(count, config.batch_size, seed=config.seed, epoch=epoch)[place]

    def _train_step(self, rows: list[int]) -> dict[str, float]:
        """One optimizer step: every micro-batch is divided by the normaliser of the whole step."""
        engine, start = self.engine, time.perf_counter()
        engine.model.train()
        count = torch.tensor(float(sum(map(self._weight, rows))), device=engine.device)
        parts = self._micro_batches(rows, self._lengths)
        totals: dict[str, Tensor] = {}
        with discarding_on_error(engine):
            for number, part in enumerate(parts, start=1):
                # Where other ranks have one more, any row will do: divided by infinity it is 0.
                indices, normalizer = (part, count) if part else (rows[:1], torch.inf * count)
                with engine.autocast():
                    loss, statistics = engine.run(
                        lambda model: self._loss(model, indices, normalizer),  # noqa: B023
                        last=number == len(parts),
                    )
                engine.backward(loss)
                for name, value in {"loss": loss.detach(), **statistics}.items():
                    totals[name] = totals.get(name, torch.zeros_like(value)) + value
            outcome = engine.step()
        names = list(totals)
        sums = self.world.all_reduce_sum(torch.stack([totals[name].float() for name in names]))
        figures = dict(zip(names, sums.tolist())) if not outcome["skipped_step"] else {}
        seconds = time.perf_counter() - start
        return {
            **figures,
            **outcome,
            "tokens_per_second": sum(self._lengths[row] for row in rows) / seconds,
            "epoch": self.step / self.steps_per_epoch,
        }

    def _micro_batches(self, rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """This rank's micro-batches of some examples."""
        config, sides = self.config, self.sequences_per_example
        return rank_micro_batches(
            rows,
            lengths,
            size=max(1, config.micro_batch_size // sides),
            tokens=config.micro_batch_tokens,
            rank=self.world.rank,
            ranks=self.world.size,
        )

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

"""PPO for language models: sample, score, estimate advantages, take a few clipped steps, again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.data import ChatFormat, prepare_tokenizer
from rlhf.engine import (
    Engine,
    Resumable,
    Trackers,
    World,
    check_config,
    check_kernels,
    ensure_writable,
    save_config,
)
from rlhf.engine.randomness import keeping_random_state_on_error
from rlhf.engine.resume import fingerprint, ids_fingerprint
from rlhf.models import load_tokenizer
from rlhf.ppo.callbacks import Callback
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.evaluation import evaluate, warn_if_none_is_best
from rlhf.ppo.experience import Experience
from rlhf.ppo.generation import Generated, Sampler
from rlhf.ppo.kl_control import KLController
from rlhf.ppo.metrics import Stopwatch, update_figures
from rlhf.ppo.models import PPOModels
from rlhf.ppo.prompts import (
    PromptOrder,
    PromptRow,
    name_of_prompts,
    prepare_prompts,
    read_prompts,
    repeat_each,
)
from rlhf.ppo.rollout import estimate_advantages, make_experience
from rlhf.ppo.samples import samples_of
from rlhf.ppo.score_shaping import ScoreShaper
from rlhf.ppo.scoring import Reward, RewardError, check_reward
from rlhf.ppo.seeds import derive_seed
from rlhf.ppo.sharing import check_share, shared_generation, shared_scores
from rlhf.ppo.update import run_epochs

KEY_FIGURES = ("reward", "score", "kl", "entropy", "approx_kl", "clip_fraction", "eos_rate")
# What the chosen backend must have; for the loss over tokens another takes its place.
PRIMITIVES = ("token_logprobs_forward", "token_logprobs_backward", "rollout_forward", "whiten")


class PPOTrainer(Resumable):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) against a reward.

    ``train()`` is nothing but the loop that a user may write instead::

        for prompts in trainer.prompts:
            experience = trainer.rollout(prompts)
            metrics = trainer.update(experience)

    The same configuration, models and data give the same figures, bit for bit, on one machine.

    Args:
        config: Settings.
        policy: A causal model: an id, a folder or an object, which is trained in place.
        tokenizer: An id, a folder or a tokenizer; None: the one that lies with the policy, which is
            then an id or a folder.
        prompts: A file, a folder, a hub name, a ``Dataset``, or a list of rows, texts or token ids.
            Columns beside the prompt go to the reward.
        reward: A ``RewardModel`` or a callable ``(prompts, responses, **columns)`` that returns one
            finite number for each response.
        critic: A model with one score per position: an id, a folder or an object, which is trained
            in place. None: a copy of the reward model if that has the policy's tokenizer, else the
            policy's trunk with a new head. An advantage estimator without a critic takes none.
        reference: The model that the KL penalty keeps the policy near. None: a copy of the policy.
        eval_prompts: Held-out prompts, likewise; ``train`` answers them every ``eval_every``
            updates, and of the checkpoints written then that with the best ``eval_score`` is kept.
        sampler: Another engine to sample with; see ``rlhf.ppo.generation.Sampler``.
        callbacks: Called at certain points of ``train``.

    Raises:
        OutputError: ``config.output_dir`` cannot be written to.
        DataError: A prompt is malformed, or too long for the models' or the reward model's context;
            the message names its row.
        ModelError: A model cannot be loaded or does not fit the others.
        TypeError: The reward is no callable, or the config another trainer's.
        ValueError: A critic was given to an advantage estimator that has none.
        BackendUnavailableError: RLHF_KERNELS_BACKEND names a backend that cannot run here.
    """

    def __init__(
        self,
        config: PPOConfig,
        policy: Any,
        tokenizer: Any,
        prompts: Any,
        reward: Reward,
        critic: Any = None,
        reference: Any = None,
        *,
        eval_prompts: Any = None,
        sampler: Sampler | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        check_config(config, PPOConfig, "PPOTrainer")
        check_reward(reward)
        ensure_writable(config.output_dir)
        check_kernels(*PRIMITIVES)
        check_share(config.batch_size, World.join())
        self.config = config
        self.reward = reward
        self.sampler = sampler
        self.callbacks = list(callbacks)
        self.tokenizer = load_tokenizer(tokenizer, policy)
        prepare_tokenizer(self.tokenizer)
        self.chat_format = ChatFormat(self.tokenizer, config.template)
        self.models = PPOModels.build(config, policy, self.tokenizer, reward, critic, reference)

        self.rows = read_prompts(prompts)
        _, prompt_ids = self._encode(self.rows, name_of_prompts(prompts))
        eval_rows = [] if eval_prompts is None else read_prompts(eval_prompts, "eval_prompts")
        eval_name = name_of_prompts(eval_prompts, "eval_prompts")
        self.eval_rows, self.eval_ids = self._encode(eval_rows, eval_name)
        warn_if_none_is_best(config, self.eval_rows)
        self.prompt_order = PromptOrder(len(self.rows), config.prompts_per_update, config.seed)

        self.device = self.models.policy.device
        self.kl_control = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.score_shaper = ScoreShaper(config)
        self.updates_done = 0
        self._stopped = False
        self._eval_score: float | None = None
        self._prepare_to_resume(
            prompts=fingerprint(self.rows),
            prompt_ids=ids_fingerprint(prompt_ids),
            eval_prompts=fingerprint(self.eval_rows),
            **self.models.fingerprints,
        )

    harmless_errors = (RewardError, *Resumable.harmless_errors)

    @property
    def policy(self) -> Any:
        """The model that is trained."""
        return self.models.policy.model

    @property
    def critic(self) -> Any:
        """The model that estimates values, if it is one of its own; else None."""
        return None if self.models.critic is None else self.models.critic.model

    @property
    def reference(self) -> Any:
        """The model that the KL penalty keeps the policy near."""
        return self.models.reference.model

    @property
    def engines(self) -> dict[str, Engine]:
        """The engines of the models that are trained, by name."""
        return self.models.trained

    @property
    def step(self) -> int:
        """Updates done so far."""
        return self.updates_done

    @property
    def metric(self) -> float | None:
        """The ``eval_score`` after the last update; None if that was not evaluated."""
        return self._eval_score

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside the engines and the random states."""
        return {
            "updates_done": self.updates_done,
            "eval_score": self._eval_score,
            "kl_control": self.kl_control.state_dict(),
            "score_shaper": self.score_shaper.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up ``state_dict`` again."""
        self.updates_done = state["updates_done"]
        self._eval_score = state.get("eval_score")  # checkpoints of earlier versions have none
        self.kl_control.load_state_dict(state["kl_control"])
        self.score_shaper.load_state_dict(state["score_shaper"])

    @property
    def prompts(self) -> Iterator[list[PromptRow]]:
        """The batches of prompts that are still to come, one for each update."""
        for number in range(self.updates_done, self.config.total_updates):
            if self._stopped:
                return
            yield [self.rows[index] for index in self.prompt_order.batch(number)]

    def train(self) -> dict[str, float]:
        """Do the updates still to come, log them, save the models.

        A resumed training first does an evaluation that failed before. A model that lies in
        ``output_dir`` counts as unfinished from the start (see ``begin_training``).

        Returns:
            The last update's metrics; of a resumed training with none left, the evaluation's.

        Raises:
            RuntimeError: This training is finished.
            CheckpointError: ``output_dir`` has checkpoints of an earlier training.
            Interrupted: SIGTERM or SIGINT has come; a checkpoint is written.
        """
        self._require_unfinished()
        with self._session(self._critic_folder), self._trackers() as trackers:
            metrics = self._begin(trackers)
            for prompts in self.prompts:
                experience = self.rollout(prompts)
                self._call("on_rollout", experience)
                metrics = self.update(experience)
                metrics.update(self._watch(trackers, experience, metrics))
                self._after_step(last=self.finished)
            self._call("on_train_end")
            self.models.policy.require_progress()
            self.save()
        return metrics

    def stop(self) -> None:
        """Have ``train`` end after the present update: it saves models, and no checkpoint."""
        self._stopped = True

    @keeping_random_state_on_error()
    def evaluate(self) -> dict[str, float]:
        """How the policy answers ``eval_prompts``; see ``rlhf.ppo.evaluation``."""
        models, reward, config = self.models, self.reward, self.config
        prompts = self.eval_rows, self.eval_ids
        return evaluate(models, self.tokenizer, *prompts, reward, config, self.sampler)

    def _begin(self, trackers: Trackers) -> dict[str, float]:
        """Do what a reward's failure left undone: the evaluation after the last update."""
        self._call("on_train_begin")
        if not self.updates_done or self._eval_score is not None:
            return {}
        if found := self._evaluate_if_due():
            trackers.log(found, self.updates_done)
            self._call("on_evaluate", found)
        return found

    def _watch(
        self, trackers: Trackers, experience: Experience, metrics: dict[str, float]
    ) -> dict[str, float]:
        """After an update: evaluate, log it, show samples; returns what was evaluated."""
        config, number, found = self.config, self.updates_done, {}
        self._call("on_update", metrics)
        try:
            found = self._evaluate_if_due()
            if found:
                self._call("on_evaluate", found)
        finally:  # the update is done, whatever the reward makes of an evaluation
            if self._is_due(config.log_every):
                trackers.log({**metrics, **found}, number)
            elif found:
                trackers.log(found, number)
            if self.world.is_main and config.samples_every and self._is_due(config.samples_every):
                trackers.log_samples(samples_of(experience, config.samples_count), number)
        return found

    def _evaluate_if_due(self) -> dict[str, float]:
        every = self.config.eval_every
        if not (every and self.eval_rows and self._is_due(every)):
            return {}
        found = self.evaluate()
        self._eval_score = found["eval_score"]
        return found

    def _is_due(self, every: int) -> bool:
        return self.updates_done % every == 0 or self.finished

    def _call(self, name: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(self, *arguments)

    def _trackers(self) -> Trackers:
        config = self.config
        return Trackers(
            config.trackers if self.world.is_main else [],
            config.output_dir,
            config.total_updates,
            title="ppo",
            key_figures=KEY_FIGURES,
            resumed_at=self.resumed_at,
        )

    def _require_unfinished(self) -> None:
        if self.finished and self.resumed_at != self.updates_done:
            raise RuntimeError(
                f"this training has ended after {self.updates_done} of "
                f"{self.config.total_updates} updates. save() writes its models; make a new "
                "trainer to train them further."
            )

    @property
    def finished(self) -> bool:
        """Whether all updates are done, or ``stop`` was called."""
        return self._stopped or self.updates_done >= self.config.total_updates

    @keeping_random_state_on_error()
    def rollout(self, prompts: Sequence[PromptRow | str | list[int]]) -> Experience:
        """Sample ``responses_per_prompt`` responses to each prompt, one after another, and work out
        all that an update needs.

        Raises:
            RewardError: The reward failed or returned something unusable. Nothing has changed, the
                global random generators included.
            DataError: A prompt is malformed or too long.
        """
        rows, encoded = self._encode(read_prompts(prompts), "prompts of this rollout")
        copies = self.config.responses_per_prompt
        rows, encoded = repeat_each(rows, copies), repeat_each(encoded, copies)
        check_share(len(rows), self.world)
        clock = Stopwatch(self.device)
        with clock.phase("generate"):
            generated = self._sample(encoded)
        self._interruption.check()
        with clock.phase("score"):
            scores, parts = shared_scores(self.reward, rows, generated.texts, self.world)
        self._interruption.check()
        with clock.phase("logprobs"):
            scores = scores.to(self.device)
            experience = make_experience(rows, generated, scores, self.models, self.config)
            self.estimate_advantages(experience)
        experience.score_parts = {name: part.to(self.device) for name, part in parts.items()}
        experience.seconds = clock.seconds
        return experience

    def estimate_advantages(self, experience: Experience) -> None:
        """Set advantages, returns, rewards and kl anew, for whoever changed the scores."""
        estimate_advantages(experience, self.config, self.score_shaper, self.kl_control.coef)

    def update(self, experience: Experience) -> dict[str, float]:
        """Train policy and critic on the experience: ``epochs`` passes in shuffled minibatches.

        Then let the KL coefficient and the moments of the scores follow it.

        Returns:
            The metrics of rollout and update that ``docs/ppo.md`` lists.

        Raises:
            SkippedStepsError: The loss or gradients were NaN or infinite too often in a row.
        """
        clock = Stopwatch(self.device)
        train_policy = self.updates_done >= self.config.critic_warmup_updates
        with clock.phase("update"):
            stats = run_epochs(
                experience,
                self.models,
                self.config,
                seed=derive_seed(self.config.seed, "minibatches", self.updates_done),
                train_policy=train_policy,
            )
        self.updates_done += 1
        self._eval_score = None
        seconds = {**experience.seconds, **clock.seconds}
        metrics = update_figures(experience, stats, self.config, seconds)
        self.score_shaper.remember(experience.scores)
        if train_policy and math.isfinite(metrics["kl"]):  # before that there is none to control
            self.kl_control.update(metrics["kl"], len(experience))
        return metrics

    def save(self) -> None:
        """Write the policy to ``output_dir`` and the critic, if there is one, to
        ``output_dir/critic``, each a Hugging Face folder with the tokenizer.
        """
        self.models.save(self.tokenizer, Path(self.config.output_dir))
        if self.world.is_main:
            save_config(self.config, self.config.output_dir)
        self.world.barrier()

    @property
    def _critic_folder(self) -> Path:
        return Path(self.config.output_dir) / "critic"

    def _encode(
        self, rows: Sequence[PromptRow], source: str
    ) -> tuple[list[PromptRow], list[list[int]]]:
        return prepare_prompts(
            rows,
            self.chat_format,
            self.policy,
            self.reward,
            max_new_tokens=self.config.max_new_tokens,
            context=self.models.context,
            source=source,
        )

    def _sample(self, prompt_ids: list[list[int]]) -> Generated:
        config = self.config
        settings = config.generation_settings(len(prompt_ids), dtype=config.dtype)
        seed = derive_seed(config.seed, "generate", self.updates_done)
        policy, sampler = self.models.policy, self.sampler
        return shared_generation(
            policy, self.tokenizer, prompt_ids, settings, seed=seed, sampler=sampler
        )

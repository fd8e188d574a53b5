"""The three stages of RLHF in one run: demonstrations -> policy, comparisons -> reward, PPO.

After Ouyang et al. 2022 (arXiv 2203.02155). Each stage leaves an ordinary Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from rlhf.data import (
    ChatFormat,
    DataError,
    Demonstration,
    PreferencePair,
    encode_demonstrations,
    prepare_tokenizer,
    source_name,
    split_slice,
)
from rlhf.engine import check_config
from rlhf.engine.resume import fingerprint
from rlhf.models import causal_config, context_length, length_limit, load_tokenizer
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo.prompts import (
    PromptRow,
    check_room_to_close,
    encode_prompts,
    read_prompts,
    rows_for_reward,
)
from rlhf.reward import (
    RewardConfig,
    RewardModel,
    RewardTrainer,
    check_padding,
    encode_pairs,
    read_pairs,
)
from rlhf.sft import SFTConfig, SFTTrainer, read_demonstrations
from rlhf.stages import Stage, StageRunner

# The pipeline gives these to its stages, so that the three of them agree.
SHARED = ("output_dir", "template")
# A file, folder or hub name, perhaps with a slice of its rows; or rows.
Data = str | list[dict[str, Any]]


@dataclass
class PipelineConfig:
    """Settings of a whole run.

    Data may be anything ``rlhf.data`` reads: a file (JSON, JSONL, CSV, Parquet, also with .gz), a
    ``datasets`` folder, a hub name, or rows as a list of dicts. A name may end with a slice of its
    rows, as in ``pairs.jsonl[:2000]``.

    Attributes:
        model: The model to begin with: a Hugging Face folder or id.
        sft_data: Demonstrations for the first stage.
        preference_data: Compared responses for the reward model.
        prompts: Prompts that PPO answers.
        output_dir: Folder of the run; each stage gets a folder in it.
        sft_eval_data: Held-out demonstrations. Null: the share sft.eval_fraction of sft_data is
            held out (0: none).
        preference_eval_data: Held-out comparisons. Null: the share reward.eval_fraction of
            preference_data is held out (0: none).
        template: How conversations are written: auto (the tokenizer's chat template, or else
            instruction), instruction, or none.
        sft: Settings of supervised fine-tuning. Its output_dir and template come from the pipeline.
        reward: Settings of reward modelling. Likewise.
        ppo: Settings of PPO. Likewise.
    """

    model: str
    sft_data: Data
    preference_data: Data
    prompts: Data
    output_dir: str = "runs/pipeline"
    sft_eval_data: Data | None = None
    preference_eval_data: Data | None = None
    template: Literal["auto", "instruction", "none"] = "auto"
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def __post_init__(self) -> None:
        for stage in ("sft", "reward", "ppo"):
            config = getattr(self, stage)
            defaults = {f.name: f.default for f in dataclasses.fields(config)}
            for name in SHARED:
                if getattr(config, name) != defaults[name]:
                    raise ValueError(f"{stage}.{name} is set by the pipeline; give {name} instead")


class RLHFPipeline:
    """Runs supervised fine-tuning, reward modelling and PPO, each once.

    ``output_dir`` afterwards holds ``sft/``, ``reward/`` and ``ppo/``, which load with
    ``AutoModelForCausalLM`` and (reward) ``AutoModelForSequenceClassification``. A second run keeps
    the finished stages; if the settings of one changed, it stops and names them.

    Args:
        config: See ``PipelineConfig``.
        say: Called with each line for the person watching.
    """

    def __init__(self, config: PipelineConfig, say: Callable[[str], None] = print) -> None:
        check_config(config, PipelineConfig, "RLHFPipeline")
        self.config = config
        self.say = say
        self.folder = Path(config.output_dir).expanduser()
        self.runner = StageRunner(
            self.folder, (self._sft_stage(), self._reward_stage(), self._ppo_stage()), say
        )

    def run(self) -> dict[str, dict[str, Any]]:
        """Run the stages that are not done; return each stage's metrics.

        Raises:
            StageError: A finished stage was made with other settings; they are named.
            DataError: Rows of a stage that is not done cannot be used or are too long; no stage was
                run.
            ModelError, OutputError: Something else that was given cannot be used.
            TypeError: The config is another class's.
        """
        return self.runner.run()

    def describe(self) -> str:
        """Say, and return, what each stage takes and gives and whether it is done."""
        text = self.runner.describe()
        self.say(text)
        return text

    def _sft_stage(self) -> Stage:
        config = self.config
        return Stage(
            name="sft",
            title="supervised fine-tuning: the model learns to answer like the demonstrations",
            takes=f"the model {config.model} and demonstrations ({name_of(config.sft_data)})",
            gives="a policy",
            settings={
                **source_settings(config, "model", "sft_data", "sft_eval_data"),
                "sft": self._stage_config(config.sft, "sft"),
            },
            run=self._run_sft,
            check=self._check_sft,
        )

    def _reward_stage(self) -> Stage:
        config = self.config
        return Stage(
            name="reward",
            title="reward modelling: a second model learns which response people prefer",
            takes=f"the policy of sft and comparisons ({name_of(config.preference_data)})",
            gives="a reward model",
            settings={
                **source_settings(config, "preference_data", "preference_eval_data"),
                "reward": self._stage_config(config.reward, "reward"),
            },
            run=self._run_reward,
            needs=("sft",),
            check=self._check_reward,
        )

    def _ppo_stage(self) -> Stage:
        config = self.config
        return Stage(
            name="ppo",
            title="PPO: the policy answers prompts and learns from the reward model's scores",
            takes=f"the policy of sft, the reward model and prompts ({name_of(config.prompts)})",
            gives="the trained policy",
            settings={
                **source_settings(config, "prompts"),
                "ppo": self._stage_config(config.ppo, "ppo"),
            },
            run=self._run_ppo,
            needs=("sft", "reward"),
            check=self._check_ppo,
        )

    def _stage_config(self, config: Any, name: str) -> Any:
        return dataclasses.replace(
            config, output_dir=str(self.folder / name), template=self.config.template
        )

    def _check_sft(self) -> None:
        check_config(self.config.sft, SFTConfig, "the stage sft")

        def encode(rows: list[Demonstration], source: str) -> None:
            _, chat_format, model = self._base()
            limit = length_limit(model, self.config.sft.max_length)
            encode_demonstrations(rows, chat_format, limit, source)

        self._check(read_demonstrations, encode, "sft_data", "sft_eval_data")

    def _check_reward(self) -> None:
        check_config(self.config.reward, RewardConfig, "the stage reward")

        def encode(pairs: list[PreferencePair], source: str) -> None:
            tokenizer, chat_format, model = self._base()
            check_padding(tokenizer)
            encode_pairs(pairs, self.config.reward, model, chat_format, source)

        self._check(read_pairs, encode, "preference_data", "preference_eval_data")

    def _check_ppo(self) -> None:
        check_config(self.config.ppo, PPOConfig, "the stage ppo")

        def encode(rows: list[PromptRow], source: str) -> None:
            _, chat_format, model = self._base()
            room: dict[str, Any] = {
                "max_new_tokens": self.config.ppo.max_new_tokens,
                "context": context_length(model),
                "source": source,
            }
            encode_prompts(rows, chat_format, **room)
            check_room_to_close(rows_for_reward(rows, chat_format), chat_format, **room)

        self._check(read_prompts, encode, "prompts")

    def _base(self) -> tuple[Any, ChatFormat, Any]:
        """What decides lengths in all stages: the tokenizer, its format, and a stand-in for the
        model that has only its config.
        """
        name = self.config.model if self.runner.marker("sft") is None else str(self.folder / "sft")
        tokenizer = load_tokenizer(name)
        prepare_tokenizer(tokenizer)
        model = SimpleNamespace(config=causal_config(name))
        return tokenizer, ChatFormat(tokenizer, self.config.template), model

    def _check(
        self, read: Callable[[Any], Any], encode: Callable[[Any, str], None], *fields: str
    ) -> None:
        """Read and encode the data that the config names in ``fields``, and say in which a mistake
        is.
        """
        for name in fields:
            data = getattr(self.config, name)
            if data is None:
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the stage reads again and warns then
                    encode(read(data), source_name(data))
            except DataError as error:
                raise DataError(f"{name}: {error}") from error

    def _run_sft(self, folder: Path) -> dict[str, Any]:
        config = self.config
        trainer = SFTTrainer(
            self._stage_config(config.sft, "sft"),
            config.model,
            config.model,
            config.sft_data,
            config.sft_eval_data,
        )
        trainer.resume_if_possible()
        return trainer.train()

    def _run_reward(self, folder: Path) -> dict[str, Any]:
        config, policy = self.config, str(self.folder / "sft")
        trainer = RewardTrainer(
            self._stage_config(config.reward, "reward"),
            policy,
            policy,
            config.preference_data,
            config.preference_eval_data,
        )
        trainer.resume_if_possible()
        return trainer.train()

    def _run_ppo(self, folder: Path) -> dict[str, Any]:
        policy = str(self.folder / "sft")
        trainer = PPOTrainer(
            self._stage_config(self.config.ppo, "ppo"),
            policy,
            policy,
            self.config.prompts,
            RewardModel.from_pretrained(self.folder / "reward"),
        )
        trainer.resume_if_possible()
        return trainer.train()


def name_of(data: Any) -> str:
    """What to call data in a sentence."""
    return str(data) if isinstance(data, str | Path) else f"{len(data)} rows"


def source_settings(config: Any, *fields: str) -> dict[str, Any]:
    """Each source's name and, where it lies here, a fingerprint of it, to notice a change."""
    settings: dict[str, Any] = {}
    for name in fields:
        source = getattr(config, name)
        if source is None:
            settings[name] = None
        elif isinstance(source, str | Path):
            settings[name] = str(source)
            settings[f"{name} content"] = fingerprint(split_slice(str(source))[0])
        else:
            settings[name] = f"rows {fingerprint(list(source))}"
    return settings

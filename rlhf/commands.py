"""What the ``rlhf`` commands take, and what each does with it.

Their options come from the configs' own fields. Nothing here loads torch or transformers until a
command's options are asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf.files import write_text

DATA = (
    "a .json, .jsonl, .csv or .parquet file (also with .gz), a datasets folder or a hub name; "
    "file[:2000] takes its first 2000 rows, file[2000:] the rest"
)
REWARD = (
    "what scores responses: a folder written by `rlhf reward`, a Python function "
    "(file.py:function or package.module:function), an http:// address, or heuristic (simple text "
    "patterns, a toy)"
)


@dataclass(frozen=True)
class Command:
    """One subcommand: what help says, its arguments, and what it does with them."""

    summary: str
    description: str
    examples: str
    add_arguments: Callable[[Any], None]
    run: Callable[[Any], None]


def _resume_arguments(parser: Any) -> None:
    parser.add_argument(
        "--resume",
        type=str | None,
        nargs="?",
        const="latest",
        help="go on from a checkpoint: its folder, or nothing for the newest in output_dir",
    )
    parser.add_argument(
        "--resume_allow",
        type=list[str],
        default=[],
        help="settings that may differ from those that the checkpoint was written with, as in "
        "[total_updates,world_size]",
    )


def train(trainer: Any, args: Any) -> None:
    """Run a trainer, from a checkpoint if that was asked for, and print its last figures."""
    if args.resume is not None:
        trainer.resume(args.resume, args.resume_allow)
    metrics = trainer.train()
    if trainer.world.is_main:
        report(metrics, trainer.config.output_dir)


# rlhf sft


def _sft_arguments(parser: Any) -> None:
    from rlhf.sft import SFTConfig

    parser.add_argument("--model", type=str, required=True, help="Hugging Face folder or id")
    parser.add_argument("--data", type=str, required=True, help=f"demonstrations: {DATA}")
    parser.add_argument("--eval_data", type=str | None, help="held-out demonstrations, likewise")
    _resume_arguments(parser)
    parser.add_class_arguments(SFTConfig)


def _run_sft(args: Any) -> None:
    from rlhf.sft import SFTConfig, SFTTrainer

    config = config_from(args, SFTConfig)
    trainer = SFTTrainer(config, args.model, None, args.data, args.eval_data)
    train(trainer, args)


# rlhf reward


def _reward_arguments(parser: Any) -> None:
    from rlhf.reward import RewardConfig

    parser.add_argument(
        "--model", type=str, required=True, help="folder or id: a causal model or a reward model"
    )
    parser.add_argument("--data", type=str, required=True, help=f"preference pairs: {DATA}")
    parser.add_argument("--eval_data", type=str | None, help="held-out pairs, likewise")
    _resume_arguments(parser)
    parser.add_class_arguments(RewardConfig)


def _run_reward(args: Any) -> None:
    from rlhf.reward import RewardConfig, RewardTrainer

    config = config_from(args, RewardConfig)
    trainer = RewardTrainer(config, args.model, None, args.data, args.eval_data)
    train(trainer, args)


# rlhf ppo


def _ppo_arguments(parser: Any) -> None:
    from rlhf.ppo import PPOConfig

    parser.add_argument(
        "--policy", type=str, required=True, help="the model to train: folder or id"
    )
    parser.add_argument("--prompts", type=str, required=True, help=f"prompts: {DATA}")
    parser.add_argument("--reward", type=str, required=True, help=REWARD)
    parser.add_argument("--eval_prompts", type=str | None, help="held-out prompts, likewise")
    parser.add_argument(
        "--preset",
        type=str | None,
        help="begin with a published recipe's settings, which other options change: "
        "ziegler2019 or tldr",
    )
    _resume_arguments(parser)
    parser.add_class_arguments(PPOConfig)


def _run_ppo(args: Any) -> None:
    from rlhf.ppo import PPOConfig, PPOTrainer
    from rlhf.sources import load_reward

    config, reward = config_from(args, PPOConfig), load_reward(args.reward)
    trainer = PPOTrainer(
        config, args.policy, None, args.prompts, reward, eval_prompts=args.eval_prompts
    )
    train(trainer, args)


# rlhf pipeline


def _pipeline_arguments(parser: Any) -> None:
    from rlhf.pipeline import PipelineConfig

    parser.add_argument(
        "--describe",
        action="store_true",
        help="only say what each stage does and whether it is done",
    )
    parser.add_class_arguments(PipelineConfig)


def _run_pipeline(args: Any) -> None:
    from rlhf.pipeline import PipelineConfig, RLHFPipeline

    pipeline = RLHFPipeline(config_from(args, PipelineConfig))
    if args.describe:
        pipeline.describe()
        return
    for stage, metrics in pipeline.run().items():
        print(f"\n{stage}")
        report(metrics, str(pipeline.folder / stage))


# rlhf best-of-n


def _best_of_n_arguments(parser: Any) -> None:
    from rlhf.ppo import GenerationSettings

    parser.add_argument("--policy", type=str, required=True, help="the model that answers")
    parser.add_argument("--prompts", type=str, required=True, help=f"prompts: {DATA}")
    parser.add_argument("--reward", type=str, required=True, help=REWARD)
    parser.add_argument("--output", type=str, required=True, help="JSONL file to write")
    parser.add_argument("--n", type=int, default=4, help="responses sampled for each prompt")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--template", type=str, default="auto", help="auto, instruction or none")
    parser.add_class_arguments(GenerationSettings)


def _run_best_of_n(args: Any) -> None:
    from rlhf.best_of import best_of_n
    from rlhf.ppo import GenerationSettings
    from rlhf.sources import load_reward

    output = Path(args.output).expanduser()
    check_output_file(output)
    results = best_of_n(
        args.policy,
        args.prompts,
        load_reward(args.reward),
        args.n,
        template=args.template,
        settings=config_from(args, GenerationSettings),
        seed=args.seed,
    )
    lines = [
        {
            "prompt": result.prompt,
            "best": result.best,
            "best_score": result.best_score,
            "candidates": [{"text": text, "score": score} for text, score in result.candidates],
        }
        for result in results
    ]
    write_jsonl(lines, output)
    best = fmean(result.best_score for result in results)
    every = fmean(score for result in results for _, score in result.candidates)
    print(f"mean score of the best of {args.n}: {best:.4g}; of one: {every:.4g}")
    print(f"{len(lines)} prompts with all candidates are in {output}")


# rlhf plan


def _plan_arguments(parser: Any) -> None:
    from rlhf.plan import SHAPES, Training

    sizes = ", ".join(SHAPES)
    parser.add_argument("--params", type=str | None, help=f"size of the policy: {sizes}")
    parser.add_argument("--model", type=str | None, help="instead: a Hugging Face folder or id")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="GiB that a GPU has")
    parser.add_argument("--json", action="store_true", help="print bytes as JSON")
    parser.add_class_arguments(Training)


def _run_plan(args: Any) -> None:
    from rlhf.plan import GIB, SHAPES, Shape, Training, memory_plan, table

    if (args.params is None) == (args.model is None):
        raise ValueError("give --params or --model, and not both")
    if args.model is not None:
        from rlhf.models.loading import causal_config

        shape = Shape.of(causal_config(args.model))
    elif args.params.lower() in SHAPES:
        shape = SHAPES[args.params.lower()]
    else:
        raise ValueError(f"params={args.params!r} must be one of {', '.join(SHAPES)}")
    training = config_from(args, Training)
    if args.json:
        plan = memory_plan(shape, training)
        print(json.dumps({**dataclasses.asdict(plan), "peak": plan.peak}, indent=2))
    else:
        print(f"{shape.total / 1e9:.3g} billion parameters\n")
        print(table(shape, training, args.gpu_memory * GIB))


# what they share


def config_from(args: Any, config_class: Any) -> Any:
    """The config dataclass filled with the parsed options of the same names."""
    names = [field.name for field in dataclasses.fields(config_class)]
    return config_class(**{name: getattr(args, name) for name in names})


def report(metrics: dict[str, Any], folder: str) -> None:
    """Print a training's figures and where its results lie."""
    for name, value in metrics.items():
        print(f"  {name:24} {value:.4g}" if isinstance(value, float) else f"  {name:24} {value}")
    print(f"  written to {folder}")


def check_output_file(path: Path) -> None:
    """Raise OutputError unless a file can be written there: before any work is done."""
    from rlhf.engine import OutputError, ensure_writable

    if path.is_dir():
        raise OutputError(f"{path} is a folder; --output names a file to write")
    ensure_writable(path.parent)


def write_jsonl(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write JSON lines in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


COMMANDS = {
    "sft": Command(
        "fine-tune a model on demonstrations",
        "Supervised fine-tuning: the model learns to answer as the demonstrations do. Rows have "
        "prompt and completion, or instruction and output, or messages.",
        "rlhf sft --model HuggingFaceTB/SmolLM2-135M-Instruct --data demos.jsonl "
        "--output_dir runs/sft",
        _sft_arguments,
        _run_sft,
    ),
    "reward": Command(
        "train a reward model on preference pairs",
        "Reward modelling: the model learns to score responses so that the preferred one of each "
        "pair scores higher. Rows have prompt, chosen and rejected, or whole dialogues in chosen "
        "and rejected.",
        'rlhf reward --model runs/sft --data "pairs.jsonl.gz[:2000]" '
        '--eval_data "pairs.jsonl.gz[2000:]" --output_dir runs/reward',
        _reward_arguments,
        _run_reward,
    ),
    "ppo": Command(
        "train a policy against a reward with PPO",
        "PPO: the policy answers prompts, the reward scores the answers, and the policy learns to "
        "score higher while a KL penalty keeps it near the model that it started from.",
        "rlhf ppo --policy runs/sft --prompts prompts.jsonl --reward runs/reward "
        "--output_dir runs/ppo\n"
        "  rlhf ppo --policy runs/sft --prompts prompts.jsonl --reward my_reward.py:score",
        _ppo_arguments,
        _run_ppo,
    ),
    "pipeline": Command(
        "all three stages, resuming where a run stopped",
        "Runs supervised fine-tuning, reward modelling and PPO. Finished stages are kept when the "
        "command is run again; if their settings changed, they are named.",
        "rlhf pipeline --config run.yaml --output_dir runs/first\n"
        "  rlhf pipeline --config run.yaml --describe",
        _pipeline_arguments,
        _run_pipeline,
    ),
    "best-of-n": Command(
        "sample n responses a prompt and keep the best",
        "Samples n responses for each prompt, scores them and writes the best with all candidates.",
        "rlhf best-of-n --policy runs/sft --prompts prompts.jsonl --reward runs/reward --n 4 "
        "--output best.jsonl",
        _best_of_n_arguments,
        _run_best_of_n,
    ),
    "plan": Command(
        "say how much memory PPO will take on each GPU",
        "Adds up what policy, critic, reference and reward model take on each GPU under every way "
        "of sharing them, and says what to change first where it does not fit.",
        "rlhf plan --params 7b --gpus 8\n  rlhf plan --model runs/sft --gpus 2 --gpu_memory 24",
        _plan_arguments,
        _run_plan,
    ),
}

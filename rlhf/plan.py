"""How much memory a PPO training takes on each GPU, before it is started.

Sums what the engine keeps and what it needs for a moment, from the models' shapes alone. The parts
that are tensors of known size are exact; activations are an estimate. Needs no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
ADAM = 2 * FLOAT32  # both moments
ADAM_8_BIT = 2 * (1 + FLOAT32 / 256)  # a scale for each block of 256
# rlhf_kernels never holds all logits: on a GPU a chunk of this size and its copy (ops/chunks.py).
HEAD_CHUNK = 2 * 256 * 2**20
# Bytes of activations that a layer keeps for its backward, per token and hidden unit, in 16 bits
# and with attention that keeps no matrix of scores (Korthikanti et al. 2022, arXiv 2205.05198,
# section 4.1, without its term for scores and without dropout); 2 with gradient checkpointing.
LAYER_ACTIVATIONS, CHECKPOINTED = 34, 2


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder.

    Attributes:
        tied: Whether the output layer is the embedding.
        head_size: Of an attention head; hidden / heads unless it is given.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    head_size: int | None = None

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Of a transformers config.

        Raises:
            ValueError: It lacks one of the numbers.
        """
        text = config.get_text_config()
        names = {
            "layers": "num_hidden_layers",
            "hidden": "hidden_size",
            "heads": "num_attention_heads",
            "intermediate": "intermediate_size",
            "vocabulary": "vocab_size",
        }
        missing = [name for name in names.values() if not hasattr(text, name)]
        if missing:
            raise ValueError(f"the model's config has no {', '.join(missing)}; give --params")
        numbers = {key: getattr(text, name) for key, name in names.items()}
        return cls(
            **numbers,
            kv_heads=getattr(text, "num_key_value_heads", None) or numbers["heads"],
            tied=bool(getattr(text, "tie_word_embeddings", False)),
            head_size=getattr(text, "head_dim", None),
        )

    @property
    def kv_width(self) -> int:
        """Numbers that a token's keys, and so its values, have in a layer."""
        return self.kv_heads * (self.head_size or self.hidden // self.heads)

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's linear maps: queries, keys, values, output, and the MLP's."""
        width = self.heads * (self.head_size or self.hidden // self.heads)
        h, i = self.hidden, self.intermediate
        attention = [(h, width), (h, self.kv_width), (h, self.kv_width), (width, h)]
        return [*attention, (h, i), (h, i), (i, h)]

    @property
    def layer(self) -> int:
        """Parameters of a layer, its two norms included."""
        return sum(a * b for a, b in self.linears) + 2 * self.hidden

    @property
    def outside(self) -> int:
        """Parameters outside the layers: embedding, last norm, output layer."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden

    @property
    def total(self) -> int:
        """Parameters of the causal model."""
        return self.layers * self.layer + self.outside

    @property
    def scalar(self) -> int:
        """Parameters of a reward model or critic: one number in place of the output layer."""
        output = 0 if self.tied else self.vocabulary * self.hidden
        return self.total - output + self.hidden

    def adapters(self, rank: int) -> int:
        """Parameters of low-rank adapters beside all linear maps."""
        return self.layers * sum(rank * (a + b) for a, b in self.linears)


# SmolLM2-135M, Llama 3.2 1B, Llama 2 7B, Llama 3 70B.
SHAPES = {
    "0.135b": Shape(30, 576, 9, 3, 1536, 49152, tied=True),
    "1b": Shape(16, 2048, 32, 8, 8192, 128256, tied=True),
    "7b": Shape(32, 4096, 32, 32, 11008, 32000),
    "70b": Shape(80, 8192, 64, 8, 28672, 128256),
}
STRATEGIES = ("one", "ddp", "fsdp", "hybrid")


@dataclass(frozen=True)
class Training:
    """The settings that decide about memory; see ``rlhf ppo --help``.

    Attributes:
        gpus: How many there are in all.
        gpus_per_node: How many are in a machine, for hybrid.
        parallel: one (a single GPU), ddp, fsdp or hybrid.
        critic: own, shared or none.
        lora_rank: Of adapters on policy and critic; None trains all weights.
        weights: float32 or bfloat16 (on one GPU: with float32 copies for adamw).
        optimizer: adamw or adamw_8bit; fsdp and hybrid always have adamw.
        reward_model: Whether a reward model of the policy's size is in the process; not with a
            function or an HTTP endpoint.
        micro_batch_tokens: Tokens in a forward pass, padding included.
        gradient_checkpointing: Whether layers are computed again in the backward pass.
        length: Tokens of prompt and response together.
        generation_batch: Responses that a GPU samples side by side.
    """

    gpus: int = 8
    gpus_per_node: int = 8
    parallel: str = "fsdp"
    critic: str = "own"
    lora_rank: int | None = None
    weights: str = "float32"
    optimizer: str = "adamw"
    reward_model: bool = True
    micro_batch_tokens: int = 8192
    gradient_checkpointing: bool = True
    length: int = 1024
    generation_batch: int = 32

    def __post_init__(self) -> None:
        checks = {
            "parallel": (self.parallel, STRATEGIES),
            "critic": (self.critic, ("own", "shared", "none")),
            "weights": (self.weights, ("float32", "bfloat16")),
            "optimizer": (self.optimizer, ("adamw", "adamw_8bit")),
        }
        for name, (value, choices) in checks.items():
            if value not in choices:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")
        for name in ("gpus", "gpus_per_node", "micro_batch_tokens", "length", "generation_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")

    @property
    def shards(self) -> int:
        """GPUs that a model's weights are split over."""
        inside = min(self.gpus_per_node, self.gpus)
        return {"one": 1, "ddp": 1, "fsdp": self.gpus, "hybrid": inside}[self.parallel]

    @property
    def is_sharded(self) -> bool:
        return self.parallel in ("fsdp", "hybrid")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU by part.

    Attributes:
        kept: What is there all the time. training, generation: What is there besides while
            optimizer steps are taken, and while responses are sampled.
    """

    kept: dict[str, float]
    training: dict[str, float]
    generation: dict[str, float]

    @property
    def peak(self) -> float:
        """The most that is there at once, without what CUDA and allocators add (a few GiB)."""
        moment = max(sum(self.training.values()), sum(self.generation.values()))
        return sum(self.kept.values()) + moment


def memory_plan(shape: Shape, training: Training) -> MemoryPlan:
    """The plan of a training of models of one shape."""
    own_critic = training.critic == "own"
    kept = {"policy": trained_bytes(shape, shape.total, training)}
    if own_critic:
        kept["critic"] = trained_bytes(shape, shape.scalar, training)
    frozen = FLOAT32 if training.weights == "float32" else BFLOAT16
    if training.lora_rank is None:
        kept["reference"] = frozen * shape.total / training.shards
    if training.reward_model:
        kept["reward model"] = FLOAT32 * shape.scalar / training.shards
    models = [shape.total, *([shape.scalar] if own_critic else [])]
    per_layer = CHECKPOINTED if training.gradient_checkpointing else LAYER_ACTIVATIONS
    units = training.micro_batch_tokens * shape.hidden
    activations = len(models) * units * per_layer * shape.layers
    if training.gradient_checkpointing:
        activations += units * LAYER_ACTIVATIONS  # of the layer that is computed again
    cache = BFLOAT16 * 2 * shape.layers * shape.kv_width * training.length
    return MemoryPlan(
        kept=kept,
        training={
            "weights at hand": weights_at_hand(shape, models, training),
            "activations": float(activations),
            "chunk of logits": float(HEAD_CHUNK),
        },
        generation={
            "gathered policy": float(BFLOAT16 * shape.total if training.is_sharded else 0),
            "KV cache": float(cache * training.generation_batch),
        },
    )


def trained_bytes(shape: Shape, parameters: int, training: Training) -> float:
    """Weights, gradients and Adam's moments of a model that is trained."""
    in_16_bits = training.weights == "bfloat16" and not training.is_sharded
    weight = BFLOAT16 if in_16_bits else FLOAT32
    if training.optimizer == "adamw_8bit" and not training.is_sharded:
        remainder = 1 if in_16_bits else 0
        each = weight + remainder + weight + ADAM_8_BIT  # gradients have the weights' type
    else:
        each = weight + (FLOAT32 if in_16_bits else 0) + FLOAT32 + ADAM
    if training.lora_rank is None:
        return each * parameters / training.shards
    adapters = shape.adapters(training.lora_rank)
    return (weight * parameters + each * adapters) / training.shards


def weights_at_hand(shape: Shape, models: list[int], training: Training) -> float:
    """Copies of weights to compute with.

    FSDP gathers the layer at work and the next one, and what is outside the layers; a layer's
    gradient is whole, in float32, until it is split. Autocast keeps its casts of all weights for a
    micro-batch.
    """
    if training.is_sharded:
        gathered = BFLOAT16 * (2 * shape.layer + len(models) * shape.outside)
        return gathered + FLOAT32 * max(shape.layer, shape.outside)
    return 0.0 if training.weights == "bfloat16" else float(BFLOAT16 * sum(models))


def what_to_change(shape: Shape, training: Training, limit: float) -> list[str]:
    """What to change, in this order and one on top of the other, until it fits; all, if it never
    does.
    """
    steps: list[tuple[str, dict[str, Any]]] = [
        ("gradient_checkpointing=true", {"gradient_checkpointing": True}),
        ("micro_batch_tokens=2048", {"micro_batch_tokens": 2048}),
        ("generation_batch_size=8", {"generation_batch": 8}),
        ("parallel=fsdp", {"parallel": "fsdp"}),
        ("critic=shared", {"critic": "shared"}),
        ("the reward behind an HTTP endpoint", {"reward_model": False}),
        ("lora_rank=16", {"lora_rank": 16}),
    ]
    changes: list[str] = []
    for name, change in steps:
        if memory_plan(shape, training).peak <= limit:
            break
        changed = dataclasses.replace(training, **change)
        if memory_plan(shape, changed).peak < memory_plan(shape, training).peak:
            training = changed
            changes.append(name)
    if memory_plan(shape, training).peak > limit:
        # Sampling gathers the policy whole, however many GPUs share it the rest of the time.
        whole = BFLOAT16 * shape.total > limit
        changes.append("a policy that fits a GPU to sample from" if whole else "more GPUs")
    return changes


def table(shape: Shape, training: Training, limit: float = 80 * GIB) -> str:
    """GiB on each GPU by part, for every strategy that so many GPUs allow, as Markdown."""
    chosen = ["one"] if training.gpus == 1 else ["ddp", "fsdp"]
    if training.gpus > training.gpus_per_node:  # else it is the same as fsdp
        chosen.append("hybrid")
    settings = {name: dataclasses.replace(training, parallel=name) for name in chosen}
    plans = {name: memory_plan(shape, setting) for name, setting in settings.items()}
    first = next(iter(plans.values()))
    rows = [["GiB on each GPU", *chosen], ["---", *["---:"] * len(chosen)]]
    for group in ("kept", "training", "generation"):
        prefix = {"kept": "", "training": "training: ", "generation": "sampling: "}[group]
        for part in getattr(first, group):
            numbers = [getattr(plan, group)[part] / GIB for plan in plans.values()]
            rows.append([prefix + part, *[f"{number:.1f}" for number in numbers]])
    rows.append(["**peak**", *[f"**{plan.peak / GIB:.1f}**" for plan in plans.values()]])
    changes = [what_to_change(shape, setting, limit) for setting in settings.values()]
    rows.append(
        [f"to fit {limit / GIB:.0f} GiB", *["; ".join(change) or "fits" for change in changes]]
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)

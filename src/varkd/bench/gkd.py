"""One on-policy update of TRL's GKDTrainer on Llamas of our sizes.

A LlamaGen is a Llama but for its rotary positions and its class slot, so a `LlamaForCausalLM` of the same sizes costs
the same. The prompt is one token (for the class), and as many tokens follow as an image has codes.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from varkd.backbones.layers import swiglu_width
from varkd.bench.machine import Precision
from varkd.bench.measure import Run
from varkd.bench.sizes import Sizes


def trl_step(sizes: Sizes, device: torch.device, precision: Precision) -> Run:
    """The run of one update: generation, both models, JSD, backward pass, clipping, optimizer."""
    with _quiet():
        trainer = _trainer(sizes, device, precision)
    length = sizes.student["grid"][0] * sizes.student["grid"][1]
    prompt_B1 = torch.zeros(sizes.step_batch, 1, dtype=torch.long, device=device)

    def update() -> Tensor:
        inputs = {"prompts": prompt_B1, "prompt_attention_mask": torch.ones_like(prompt_B1)}
        with _quiet():
            loss = trainer.training_step(trainer.model_wrapped, inputs)
        made = inputs["input_ids"].shape[1]
        if made != length + 1:
            raise RuntimeError(f"TRL generated {made - 1} tokens instead of {length}")
        nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        return loss

    return update


def _trainer(sizes: Sizes, device: torch.device, precision: Precision) -> Any:
    """A trainer as it stands when its `train()` begins its first step."""
    gkd, transformers = import_module("trl.experimental.gkd"), import_module("transformers")
    student, teacher = (
        transformers.LlamaForCausalLM(_config(model)).to(device) for model in (sizes.student, sizes.teacher)
    )
    teacher.requires_grad_(False)
    trainer: Any = gkd.GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=_settings(sizes, device, precision, student.config.max_position_embeddings - 1),
        train_dataset=_unused_rows(),
        data_collator=lambda rows: rows,
        processing_class=_tokenizer(sizes.student["vocab_size"]),
    )
    trainer.create_optimizer()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what these libraries say of their own future."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _config(sizes: Any) -> Any:
    length = sizes["grid"][0] * sizes["grid"][1] + 1
    return import_module("transformers").LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["dim"],
        intermediate_size=sizes.get("ffn_dim") or swiglu_width(sizes["dim"]),
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_heads"],
        max_position_embeddings=length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _settings(sizes: Sizes, device: torch.device, precision: Precision, length: int) -> Any:
    return import_module("trl.experimental.gkd").GKDConfig(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        per_device_train_batch_size=sizes.step_batch,
        max_steps=1,
        learning_rate=1e-6,
        weight_decay=0.05,
        bf16=precision == "bf16",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=False,
        report_to=[],
        lmbda=1.0,
        beta=0.5,
        temperature=1.0,
        max_new_tokens=length,
        max_length=length + 1,
    )


def _unused_rows() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"messages": [[{"role": "user", "content": "0"}, {"role": "assistant", "content": "1"}]]})


def _tokenizer(vocab_size: int) -> Any:
    """One word per code; the trainer asks for a tokenizer, and for its padding."""
    tokenizers = import_module("tokenizers")
    vocabulary = {str(code): code for code in range(vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="0"))
    return import_module("transformers").PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token="0", unk_token="0"
    )

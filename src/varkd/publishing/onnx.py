"""A LlamaGen and its tokenizer as two ONNX graphs, which run without PyTorch.

`step.onnx` reads one slot (a class, then code after code) and predicts the next code; the key-value cache goes in, and
what is new in it comes out, so that whoever decodes writes it where it belongs. `decoder.onnx` turns codes into uint8
images. `about.json` says the sizes.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varkd.backbones.layers import rope_table, rotate
from varkd.backbones.llamagen import LlamaGen
from varkd.backbones.protocol import Backbone
from varkd.errors import VarkdError
from varkd.files import write_json
from varkd.rollout import Sampler
from varkd.tokenizers.protocol import Tokenizer

STEP, DECODER, ABOUT = "step.onnx", "decoder.onnx", "about.json"
_OPSET = 18


class Step(nn.Module):
    """One decoding step with everything it changes as an input or output.

    The table of inputs holds the labels (the null label last), then the codes.
    """

    table_TD: Tensor
    rope: Tensor

    def __init__(self, model: LlamaGen) -> None:
        super().__init__()
        self.layers, self.norm, self.output = model.layers, model.norm, model.output
        self.heads, self.slots = model.config.num_heads, model.sequence_length
        labels = model.cls_embedding.embedding_table.weight
        self.register_buffer("table_TD", torch.cat([labels, model.tok_embeddings.weight]).detach())
        table = rope_table(tuple(model.config.grid), model.config.head_dim, model.config.rope_base, labels.device)
        self.register_buffer("rope", table[: self.slots].clone())

    def forward(self, input_B: Tensor, slot: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Read one slot.

        Args:
            input_B: int32 rows of the table.
            slot: int32 (1,), 0 for the class.
            cache: float32 (layers, 2, B, heads, L, head_dim); slots from `slot` on are not looked at.

        Returns:
            Logits (B, V) of the code at raster position `slot`, and the slot's keys and values (layers, 2, B, heads, 1,
            head_dim).
        """
        x_B1D = self.table_TD[input_B.long()].unsqueeze(1)
        rope, place_S = self.rope[slot.long()], torch.arange(self.slots, device=slot.device, dtype=torch.int32)
        here_S1, unseen_S = (place_S == slot).unsqueeze(1), place_S > slot
        new = []
        for index, layer in enumerate(self.layers):
            block: Any = layer
            qkv = block.attention.wqkv(block.attention_norm(x_B1D)).unflatten(-1, (3, self.heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            q, k = rotate(q, rope), rotate(k, rope)
            keys, values = torch.where(here_S1, k, cache[index, 0]), torch.where(here_S1, v, cache[index, 1])
            scores = (q @ keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
            weights = scores.masked_fill(unseen_S, -torch.inf).softmax(-1)
            x_B1D = x_B1D + block.attention.wo((weights @ values).transpose(1, 2).flatten(2))
            x_B1D = x_B1D + block.feed_forward(block.ffn_norm(x_B1D))
            new.append(torch.stack([k, v]))
        return self.output(self.norm(x_B1D)).squeeze(1), torch.stack(new)


class Decoder(nn.Module):
    """Codes int32 (B, L) -> uint8 images (B, C, H, W), by the tokenizer's own rounding."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, codes_BL: Tensor) -> Tensor:
        return self.tokenizer.to_uint8(self.tokenizer.decode(codes_BL.long()))


def write_onnx(model: Backbone, tokenizer: Tokenizer, sampler: Sampler, folder: Path, name: str) -> dict[str, Any]:
    """Write both graphs and what a sampler must know into an existing folder; returns the latter.

    Raises:
        VarkdError: another family than LlamaGen, or a student that reads the guidance scale.
    """
    if not isinstance(model, LlamaGen):
        raise VarkdError(f"only a LlamaGen can be exported to ONNX so far, and this is {model.family}")
    if model.guidance_conditioned:
        raise VarkdError("this student reads the guidance scale, which the exported graph has no input for")
    model, tokenizer = model.to("cpu", torch.float32).eval(), tokenizer.to("cpu").eval()
    config = model.config
    cache = torch.zeros(config.num_layers, 2, 2, config.num_heads, model.sequence_length, config.head_dim)
    step = Step(model).requires_grad_(False).eval()
    _export(
        step,
        (torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), cache),
        folder / STEP,
        ("input", "slot", "cache"),
        ("logits", "new"),
        {"input": {0: "rows"}, "cache": {2: "rows"}},
    )
    codes_BL = torch.zeros(2, model.sequence_length, dtype=torch.int32)
    decoder = Decoder(tokenizer).requires_grad_(False).eval()
    _export(decoder, (codes_BL,), folder / DECODER, ("codes",), ("images",), {"codes": {0: "rows"}})
    about = {
        "name": name,
        "vocab_size": config.vocab_size,
        "num_classes": config.num_classes,
        "grid": list(config.grid),
        "class_names": list(model.class_names or map(str, range(config.num_classes))),
        "layers": config.num_layers,
        "heads": config.num_heads,
        "head_dim": config.head_dim,
        "image_shape": list(tokenizer.image_shape),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sampler": {
            "temperature": sampler.temperature,
            "top_k": sampler.top_k,
            "top_p": sampler.top_p,
            "guidance": sampler.guidance,
        },
    }
    write_json(folder / ABOUT, about)
    return about


def _export(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    names: tuple[str, ...],
    outputs: tuple[str, ...],
    dynamic: dict[str, dict[int, str]],
) -> None:
    import onnx  # noqa: F401 - a missing extra is one line here, not a traceback from inside PyTorch
    import onnxscript  # noqa: F401

    for logger in ("torch.onnx", "onnxscript"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    rows = torch.export.Dim("rows", min=1, max=4096)
    shapes = tuple(dict.fromkeys(dynamic.get(name, {}), rows) for name in names)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=_OPSET,
            verbose=False,
        )
        assert program is not None
        program.save(str(path))

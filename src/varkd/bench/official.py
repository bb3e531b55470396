"""The official LlamaGen and VAR, imported from checkouts that the user named, with the weights of our models.

Nothing of them is part of varkd. What is changed from outside: VAR returns its residual features instead of decoded
images (our side draws codes, too), and is told the device where it would guess one.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from varkd.backbones.llamagen import LlamaGen
from varkd.backbones.var import VAR
from varkd.errors import VarkdError
from varkd.types import Condition

_LLAMAGEN = ("autoregressive/models/gpt.py", "autoregressive/models/generate.py", "utils/drop_path.py")
_VAR = ("models/var.py", "models/vqvae.py", "dist.py")


@dataclass(frozen=True)
class Checkout:
    """A folder with official code; its files are looked for at once, imported when they are needed."""

    path: Path
    name: str

    @classmethod
    def of_llamagen(cls, path: Path) -> Checkout:
        return cls(path, "LlamaGen")._with(_LLAMAGEN)

    @classmethod
    def of_var(cls, path: Path) -> Checkout:
        return cls(path, "VAR")._with(_VAR)

    def _with(self, files: tuple[str, ...]) -> Checkout:
        missing = [file for file in files if not (self.path / file).is_file()]
        if missing:
            raise VarkdError(
                f"no checkout of the official {self.name} at {self.path} (it has no {missing[0]}): give the folder "
                f"that `git clone https://github.com/FoundationVision/{self.name}` makes"
            )
        return self

    def modules(self, *names: str) -> list[ModuleType]:
        """Import modules of the checkout.

        Raises:
            VarkdError: other code has taken the name of one, or the checkout needs what is not installed.
        """
        with _first_on_path(self.path):
            try:
                found = [importlib.import_module(name) for name in names]
            except ImportError as error:
                raise VarkdError(f"the official {self.name} at {self.path} {self._reason(error)}") from error
        for module in found:
            if not Path(str(module.__file__)).resolve().is_relative_to(self.path.resolve()):
                raise VarkdError(
                    f"the official {self.name} needs its own {module.__name__}, but {module.__file__} goes by that "
                    "name: take it off PYTHONPATH"
                )
        return found

    def _reason(self, error: ImportError) -> str:
        if error.name is None:
            return f"cannot be imported ({error})"
        if (self.path / (error.name.replace(".", "/") + ".py")).is_file():
            package = error.name.split(".")[0]
            return f"needs its own '{package}', but another package goes by that name: take it off PYTHONPATH"
        return f"needs the package {error.name}, which is not installed: pip install it"


@dataclass(frozen=True)
class OfficialLlamaGen:
    """The official model and its sampling function."""

    model: Any
    generate: Any

    @classmethod
    def like(cls, ours: LlamaGen, checkout: Checkout, compiled: bool) -> OfficialLlamaGen:
        """With the weights, device and dtype of `ours`; `compiled` as its sampling script does with --compile."""
        gpt, sampling = checkout.modules("autoregressive.models.gpt", "autoregressive.models.generate")
        config, weight = ours.config, ours.output.weight
        rows, columns = config.grid
        sizes = {"dim": config.dim, "n_layer": config.num_layers, "n_head": config.num_heads}
        sizes |= {"vocab_size": config.vocab_size, "block_size": rows * columns, "num_classes": config.num_classes}
        model = gpt.Transformer(gpt.ModelArgs(**sizes)).to(weight.device, weight.dtype)
        model.load_state_dict(ours.official_state(), strict=True)
        model.eval().requires_grad_(False)
        if compiled:
            model = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        return cls(model, sampling.generate)

    def sample(self, label_B: Tensor, length: int, guidance: float, greedy: bool = False) -> Tensor:
        """Codes (B, L) at temperature 1 without filters."""
        how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "sample_logits": not greedy}
        with _quiet():
            return self.generate(self.model, label_B, length, cfg_scale=guidance, **how)

    @torch.no_grad()
    def logits(self, codes_BL: Tensor, label_B: Tensor) -> Tensor:
        """Of every code, teacher forced: (B, L, V)."""
        plain = getattr(self.model, "_orig_mod", self.model)  # the caches of a compiled one belong to its graphs
        for layer in plain.layers:
            layer.attention.kv_cache = None
        plain.freqs_cis = plain.freqs_cis.to(codes_BL.device)
        return plain(codes_BL, label_B)[0][:, : codes_BL.shape[1]]


@dataclass(frozen=True)
class OfficialVAR:
    """The official model, with a tokenizer of which only the quantizer is used."""

    model: Any

    @classmethod
    def like(cls, ours: VAR, checkout: Checkout) -> OfficialVAR:
        dist, vqvae, var = checkout.modules("dist", "models.vqvae", "models.var")
        config, device = ours.config, ours.pos_1LC.device
        vars(dist)["get_device"] = lambda: device
        with _quiet():
            tokenizer = vqvae.VQVAE(
                config.vocab_size, config.code_dim, ch=32, share_quant_resi=config.num_phi, v_patch_nums=config.scales
            )
            model = var.VAR(
                tokenizer,
                num_classes=config.num_classes,
                depth=config.num_layers,
                embed_dim=config.dim,
                num_heads=config.num_heads,
                norm_eps=config.norm_eps,
                cond_drop_rate=0.0,
                attn_l2_norm=True,
                patch_nums=config.scales,
                flash_if_available=device.type == "cuda",
                fused_if_available=device.type == "cuda",
            )
        model.load_state_dict(ours.official_state(), strict=True)
        tokenizer.quantize.embedding.weight.data.copy_(ours.quantizer_codebook)
        for index, phi in enumerate(tokenizer.quantize.quant_resi.qresi_ls):
            phi.weight.data.copy_(ours.quantizer_phi_weight[index])
            phi.bias.data.copy_(ours.quantizer_phi_bias[index])
        tokenizer.fhat_to_img = lambda features: features
        tokenizer.to(device)
        return cls(model.to(device).eval().requires_grad_(False))

    def sample(self, label_B: Tensor, cfg: float, top_k: int, top_p: float) -> Tensor:
        """Residual features of the last scale; `top_p` 0 keeps all."""
        with _quiet():
            return self.model.autoregressive_infer_cfg(
                len(label_B), label_B, g_seed=0, cfg=cfg, top_k=top_k, top_p=top_p
            )

    @torch.no_grad()
    def logits(self, ours: VAR, codes_BL: Tensor, condition: Condition) -> Tensor:
        with _quiet():
            return self.model(condition.label_B, ours.quantizer.inputs(codes_BL))


@contextmanager
def _first_on_path(path: Path) -> Iterator[None]:
    """The checkout's modules come first, and nothing is written into it."""
    wrote, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(path.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(path.resolve()))
        sys.dont_write_bytecode = wrote


@contextmanager
def _quiet() -> Iterator[None]:
    """Official code prints its sizes, and warns of calls that PyTorch has renamed since."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

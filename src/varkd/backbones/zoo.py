"""The published models and tokenizers, as a table: values only, no torch.

Facts come from the official repositories and papers (docs/backbones.md says which). What nobody states is None. Every
`params` is exact: parameters without buffers, which a test counts by building each model without weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from varkd.backbones.published import PUBLISHED
from varkd.errors import VarkdError, did_you_mean

Layout = Literal["raw", "model", "state_dict", "safetensors"]
"""What an official file is: a state dict, one under a key, or a safetensors file."""

NUM_CLASSES = 1000
"""All published models are class-conditional on ImageNet-1k."""


@dataclass(frozen=True)
class Entry:
    """One published model.

    `codes` is the sequence length N; either `grid` (rows, columns) or `scales` (sides, coarse to fine) lays it out.
    `sizes` are the other fields of our config. `sampling` is the setting behind `fid` in the units of our `Sampler`
    (for VAR: guidance = official cfg + 1), `official` the same in the authors' words; `fid` is the number that the
    official repository states for it. `license` is that of the official repository.
    """

    name: str
    family: str
    params: int
    codes: int
    vocab_size: int
    resolution: int
    grid: tuple[int, int] | None
    scales: tuple[int, ...] | None
    tokenizer: str
    file: str
    hub: str
    container: Layout
    license: str
    fid: float | None
    sizes: Mapping[str, Any]
    sampling: Mapping[str, Any]
    official: str | None

    @property
    def config(self) -> dict[str, Any]:
        """All fields of our config."""
        layout = {"scales": self.scales} if self.scales else {"grid": self.grid}
        return {"vocab_size": self.vocab_size, "num_classes": NUM_CLASSES, **layout, **self.sizes}


@dataclass(frozen=True)
class TokenizerEntry:
    """One published tokenizer. `downsampling` is pixels per code side; `rfid` at `resolution`, as the authors state."""

    name: str
    kind: str
    params: int
    vocab_size: int
    code_dim: int
    downsampling: int
    resolution: int
    file: str
    hub: str
    container: Layout
    license: str
    rfid: float | None


_VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def _sampling(
    guidance: float | None,
    *,
    guidance_power: float | None = None,
    steps: int | None = None,
    step_schedule: str | None = None,
    top_k: int | None = 0,
    top_p: float | None = 1.0,
    temperature: float | None = 1.0,
) -> dict[str, Any]:
    return {
        "guidance": guidance,
        "guidance_power": guidance_power,
        "steps": steps,
        "step_schedule": step_schedule,
        "top_k": top_k,
        "top_p": top_p,
        "temperature": temperature,
    }


def _llamagen(
    size: str,
    resolution: int,
    params: int,
    num_layers: int,
    dim: int,
    num_heads: int,
    ffn_dim: int,
    fid: float,
    cfg: float | None,
    container: Layout = "model",
) -> Entry:
    side = resolution // 16
    official = (
        "cfg not stated; top-k 0, top-p 1, temperature 1"
        if cfg is None
        else (f"cfg {cfg:g}, top-k 0, top-p 1, temperature 1; samples resized from {resolution} to 256 px for FID")
    )
    return Entry(
        f"LlamaGen-{size}-{resolution}",
        "llamagen",
        params,
        side * side,
        16384,
        resolution,
        (side, side),
        None,
        "VQ-16",
        f"c2i_{size}_{resolution}.pt",
        "FoundationVision/LlamaGen",
        container,
        "MIT",
        fid,
        {"num_layers": num_layers, "dim": dim, "num_heads": num_heads, "ffn_dim": ffn_dim},
        _sampling(cfg),
        official,
    )


def _var(depth: int, params: int, resolution: int, fid: float, shared_adaln: bool = False) -> Entry:
    scales = _VAR_512 if resolution == 512 else _VAR_256
    sizes = {
        "num_layers": depth,
        "dim": 64 * depth,
        "num_heads": depth,
        "ffn_dim": 256 * depth,
        "code_dim": 32,
        "shared_adaln": shared_adaln,
    }
    return Entry(
        f"VAR-d{depth}",
        "var",
        params,
        sum(side * side for side in scales),
        4096,
        resolution,
        None,
        scales,
        "VAR-VQVAE",
        f"var_d{depth}.pth",
        "FoundationVision/var",
        "raw",
        "MIT",
        fid,
        sizes,
        _sampling(2.5, top_k=900, top_p=0.96),
        "cfg 1.5, top-k 900, top-p 0.96, more_smooth off",
    )


def _arpg(
    size: str,
    params: int,
    num_layers: int,
    dim: int,
    num_heads: int,
    ffn_dim: int,
    fid: float,
    cfg: float,
    file: str,
    other: str,
) -> Entry:
    return Entry(
        f"ARPG-{size}",
        "arpg",
        params,
        256,
        16384,
        256,
        (16, 16),
        None,
        "VQ-16",
        file,
        "hp-l33/ARPG",
        "state_dict",
        "MIT",
        fid,
        {"num_layers": num_layers, "dim": dim, "num_heads": num_heads, "ffn_dim": ffn_dim},
        _sampling(cfg, steps=64, step_schedule="cosine"),
        f"cfg {cfg:g} linear, 64 steps, cosine; also {other}",
    )


def _randar(
    name: str,
    params: int,
    num_layers: int,
    dim: int,
    num_heads: int,
    ffn_dim: int,
    vocab_size: int,
    tokenizer: str,
    fid: float,
    cfg: float,
    file: str,
) -> Entry:
    return Entry(
        f"RandAR-{name}",
        "randar",
        params,
        256,
        vocab_size,
        256,
        (16, 16),
        None,
        tokenizer,
        f"randar_{file}_360k_bs_1024_lr_0.0004.safetensors",
        "ziqipang/RandAR",
        "safetensors",
        "MIT",
        fid,
        {"num_layers": num_layers, "dim": dim, "num_heads": num_heads, "ffn_dim": ffn_dim},
        _sampling(cfg, steps=88),
        f"cfg scales 1.0,{cfg:g} linear, 88 steps, no top-k or top-p",
    )


def _rar(
    size: str,
    params: int,
    num_layers: int,
    dim: int,
    ffn_dim: int,
    fid: float,
    temperature: float,
    scale: float,
    power: float,
) -> Entry:
    return Entry(
        f"RAR-{size}",
        "rar",
        params,
        256,
        1024,
        256,
        (16, 16),
        None,
        "MaskGIT-VQGAN",
        f"rar_{size.lower()}.bin",
        "yucornetto/RAR",
        "raw",
        "Apache-2.0",
        fid,
        {"num_layers": num_layers, "dim": dim, "num_heads": 16, "ffn_dim": ffn_dim},
        _sampling(scale, guidance_power=power, temperature=temperature),
        f"guidance_scale {scale:g}, guidance_scale_pow {power:g}, temperature {temperature:g}",
    )


ENTRIES: tuple[Entry, ...] = (
    _llamagen("B", 256, 110_888_448, 12, 768, 12, 2048, 5.46, None),
    _llamagen("B", 384, 110_888_448, 12, 768, 12, 2048, 6.09, 2.0),
    _llamagen("L", 256, 342_910_976, 24, 1024, 16, 2816, 3.80, None),
    _llamagen("L", 384, 342_910_976, 24, 1024, 16, 2816, 3.07, 2.0),
    _llamagen("XL", 384, 774_699_520, 36, 1280, 20, 3584, 2.62, 1.75),
    _llamagen("XXL", 384, 1_410_972_672, 48, 1536, 24, 4096, 2.34, 1.75, "raw"),
    _llamagen("3B", 384, 3_096_659_200, 24, 3200, 32, 8704, 2.18, 1.65, "raw"),
    _var(16, 310_283_520, 256, 3.55),
    _var(20, 600_917_136, 256, 2.95),
    _var(24, 1_033_399_360, 256, 2.33),
    _var(30, 2_010_020_356, 256, 1.97),
    _var(36, 2_353_893_904, 512, 2.63, shared_adaln=True),
    _arpg("L", 319_845_376, 24, 1024, 16, 2816, 2.44, 4.5, "arpg_300m.pt", "cfg 5 with arccos: FID 2.38"),
    _arpg("XL", 718_997_760, 36, 1280, 20, 3584, 2.10, 6.0, "arpg_700m.pt", "cfg 6 with arccos: FID 2.02"),
    _arpg("XXL", 1_302_449_664, 48, 1536, 24, 4096, 1.94, 7.5, "arpg_1b.pt", "cfg 7.5 with arccos: FID 1.91"),
    _randar("L-llamagen", 342_912_000, 24, 1024, 16, 2816, 16384, "VQ-16", 2.65, 3.4, "0.3b_llamagen"),
    _randar("L-maskgit", 311_454_720, 24, 1024, 16, 2816, 1024, "MaskGIT-VQGAN", 2.47, 4.0, "0.3b_maskgit"),
    _randar("XL-llamagen", 774_700_800, 36, 1280, 20, 3584, 16384, "VQ-16", 2.27, 4.0, "0.7b_llamagen"),
    _rar("B", 260_923_648, 24, 768, 3072, 1.95, 1.0, 16.0, 2.75),
    _rar("L", 461_668_352, 24, 1024, 4096, 1.70, 1.02, 15.5, 2.5),
    _rar("XL", 955_425_024, 32, 1280, 5120, 1.50, 1.02, 6.9, 1.5),
    _rar("XXL", 1_498_520_704, 40, 1408, 6144, 1.48, 1.02, 8.0, 1.2),
)

_LLAMAGEN, _TITOK = "FoundationVision/LlamaGen", "fun-research/TiTok"
TOKENIZERS: tuple[TokenizerEntry, ...] = (
    TokenizerEntry("VQ-16", "vq", 71_883_403, 16384, 8, 16, 256, "vq_ds16_c2i.pt", _LLAMAGEN, "model", "MIT", 2.19),
    TokenizerEntry("VQ-8", "vq", 70_109_835, 16384, 8, 8, 256, "vq_ds8_c2i.pt", _LLAMAGEN, "model", "MIT", 0.59),
    TokenizerEntry("VAR-VQVAE", "multiscale", 108_948_355, 4096, 32, 16, 256, "vae_ch160v4096z32.pth",
                   "FoundationVision/var", "raw", "MIT", None),
    TokenizerEntry("MaskGIT-VQGAN", "maskgit", 54_515_587, 1024, 256, 16, 256, "maskgit-vqgan-imagenet-f16-256.bin",
                   _TITOK, "raw", "Apache-2.0", None),
)  # fmt: skip


def entry(name: str) -> Entry:
    """The published model of that name.

    Raises:
        VarkdError: there is none.
    """
    by_name = {known.name.lower(): known for known in ENTRIES}
    if name.lower() not in by_name:
        hint = did_you_mean(name, [known.name for known in ENTRIES])
        raise VarkdError(f"no published model '{name}' in `varkd zoo`: {hint}")
    return by_name[name.lower()]


def with_sizes(family: str, sizes: Mapping[str, Any]) -> list[Entry]:
    """The published models of a family whose config agrees with all of `sizes`."""
    return [known for known in ENTRIES if known.family == family and agrees(known, sizes)]


def agrees(known: Entry, sizes: Mapping[str, Any]) -> bool:
    """Whether `sizes` holds no other value than the published model's."""
    config = known.config
    return all(config[name] == value for name, value in sizes.items() if name in config)


def describe(tokenizers: bool = False) -> list[dict[str, Any]]:
    """The table as JSON values; models with what is published of their samples."""
    if tokenizers:
        return [asdict(row) for row in TOKENIZERS]
    return [asdict(row) | {"published": asdict(PUBLISHED[row.name])} for row in ENTRIES]


def format_zoo() -> str:
    """The published models as text: a heading for each family, a line for each model."""
    header = ("name", "params", "codes", "px", "tokenizer", "FID", "file")
    rows = [
        (
            known.name,
            _millions(known.params),
            str(known.codes),
            str(known.resolution),
            known.tokenizer,
            _number(known.fid),
            known.file,
        )
        for known in ENTRIES
    ]
    lines, family = _aligned(header, rows, right=(1, 2, 3, 5)), ""
    text = [lines[0]]
    for known, line in zip(ENTRIES, lines[1:], strict=True):
        if known.family != family:
            family = known.family
            text += ["", f"{family}  ({known.license}, https://huggingface.co/{known.hub})"]
        text.append(line)
    return "\n".join([*text, "", "FID as the official repositories state it; `varkd zoo --json` adds the settings."])


def format_tokenizers() -> str:
    """The published tokenizers as text."""
    header = ("name", "kind", "params", "codes", "dim", "px", "rFID", "license", "file")
    rows = [
        (
            known.name,
            known.kind,
            _millions(known.params),
            str(known.vocab_size),
            str(known.code_dim),
            str(known.downsampling),
            _number(known.rfid),
            known.license,
            known.file,
        )
        for known in TOKENIZERS
    ]
    return "\n".join([*_aligned(header, rows, right=(2, 3, 4, 5, 6)), "", "px: image pixels per code, along one side."])


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return [line(row) for row in (header, *rows)]


def _millions(params: int) -> str:
    return f"{params / 1e6:,.1f}M"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

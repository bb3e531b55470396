"""The one decode loop, and everything that turns logits into codes.

Every code costs one uniform number, drawn up front and pushed through the inverse CDF: that makes micro-batch = whole,
two ranks = one, resume and paired samples testable. No gradients and no files here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from varkd import graphs
from varkd.backbones.protocol import Backbone, GuidanceKind, Nucleus, SlotDecoder
from varkd.errors import VarkdError
from varkd.types import Condition, Plan
from varkd.world import Rng
from varkd.zipar import NONE, Waves


@dataclass(frozen=True)
class Sampler:
    """How codes are drawn: guidance, then temperature, then top-k, then top-p.

    `temperature=0` is greedy. `top_k=0` and `top_p=1` keep everything. `guidance` is the largest scale s in
    null + s (cond - null) while an image is decoded, 1 is off; how s gets there is `guidance_schedule`, by default each
    family's own (`guidance_per_step`; VAR's official `cfg` is `guidance` - 1). `steps` asks for parallel decoding,
    sharing the codes out by `step_schedule` where a family knows several.

    `parallel` decodes the grid's rows of raster models at once (ZipAR, `varkd.zipar`), each row `window` codes behind
    the one above; "auto" does so where the model can and leaves other families to their own way. It changes what is
    drawn, so the log-probability of a sample is that of the draw and not the model's.
    """

    kind: Literal["sampler"] = "sampler"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    guidance_schedule: Literal["family", GuidanceKind] = "family"
    guidance_interval: int = -1
    guidance_start: float = 1.0
    guidance_power: float = 1.0
    steps: int | None = None
    step_schedule: str | None = None
    parallel: Literal["off", "zipar", "auto"] = "off"
    window: int = 4

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and self.guidance >= 0):
            raise VarkdError(
                f"sampler: need temperature >= 0, top_k >= 0, 0 < top_p <= 1 and guidance >= 0, "
                f"got {self.temperature}, {self.top_k}, {self.top_p}, {self.guidance}"
            )
        if self.steps is not None and self.steps < 1:
            raise VarkdError(f"sampler: steps must be at least 1, got {self.steps}")
        if self.window < 1:
            raise VarkdError(f"sampler: window must be at least 1 code, got {self.window}")

    def check(self, model: Backbone) -> None:
        """Raise `VarkdError` where `model` cannot decode in parallel as asked."""
        if self.parallel == "zipar" and not isinstance(model, SlotDecoder):
            raise VarkdError(
                f"parallel=zipar is for llamagen; {model.family} decodes in parallel in its own way: use "
                "parallel=auto, or steps= where it has them"
            )

    def decodes_rows_at_once(self, width: int) -> bool:
        """Whether rows of a grid this wide are decoded together: a full window is the sequential order itself."""
        return self.parallel != "off" and self.window < width

    def plan(self, model: Backbone, rng: Rng, row_B: Tensor, order_BL: Tensor | None = None) -> Plan:
        """How `model` decodes one sequence for each of `row_B`.

        Raises:
            VarkdError: the model cannot decode like that.
        """
        self.check(model)
        return model.plan(len(row_B), rng, row_B, self.steps, order_BL, self.step_schedule)


@dataclass(frozen=True)
class Samples:
    """Codes int64 (B, L) in raster order and the log-probability (nats) under which each one was drawn.

    `accept_BL` says, where two models decoded together, which of the first one's proposals were kept.
    """

    codes_BL: Tensor
    logp_BL: Tensor
    accept_BL: Tensor | None = None


Rule = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""(own_logp_BnV, other_logp_BnV, uniform_Bn, spare_Bn) -> codes, their log-probability and perhaps what it accepted."""


@dataclass(frozen=True)
class JointDecoding:
    """A second model that decodes the same sequences in lock-step: `rule` makes one choice of two distributions.

    `spare_BL` holds a second uniform number for every code, by generation rank, for rules that draw twice.
    """

    model: Backbone
    rule: Rule
    spare_BL: Tensor


@torch.no_grad()
def rollout(
    model: Backbone,
    condition: Condition,
    plan: Plan,
    sampler: Sampler,
    uniform_BL: Tensor,
    kept_codes_BL: Tensor | None = None,
    kept_BL: Tensor | None = None,
    joint: JointDecoding | None = None,
) -> Samples:
    """Generate one sequence per row of `condition` under `plan`.

    On CUDA the loop of one model becomes a CUDA graph when it is used a second time (`varkd.graphs`).

    Args:
        uniform_BL: numbers in [0, 1), one for every code, by generation rank.
        kept_codes_BL, kept_BL: codes in raster order, and where they are kept instead of sampled (a prefix, or any
            other positions); leading steps that are kept as a whole cost one forward pass together.
        joint: a second model to decode with.

    Returns:
        The codes; kept codes have log-probability 0 and count as accepted.

    Raises:
        VarkdError: the plan or the sampler is none that the models know.
    """
    given_BL, kept_rank_BL, prefix_steps = _kept_by_rank(plan, kept_codes_BL, kept_BL)
    if prefix_steps == len(plan.sizes):
        return Samples(given_BL.gather(1, plan.rank_BL), torch.zeros_like(uniform_BL))
    models = [model, joint.model] if joint else [model]
    for each in models:  # a teacher may be of another family than the student that made the plan
        sampler.check(each)
        each.check(plan)
    captured = joint is None and graphs.available(model, uniform_BL.device)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled blocks read whole sequences
        for each in models:
            stack.enter_context(evaluating(each))
        if isinstance(model, SlotDecoder) and sampler.decodes_rows_at_once(model.config.grid[1]):
            if joint is not None:
                raise VarkdError("parallel=zipar decodes one model alone: use parallel=off where two decode together")
            return _rollout_waves(model, condition, plan, sampler, uniform_BL, (given_BL, kept_rank_BL), captured)
        if captured:  # few different numbers of steps, for each is a graph of its own
            prefix_steps -= prefix_steps % max(1, len(plan.sizes) // GRAPH_LENGTHS)
        loop = _Loop(models, sampler, plan.sizes, prefix_steps, joint)
        inputs = (condition.label_B, condition.guidance_B, plan.order_BL, uniform_BL, given_BL, kept_rank_BL)
        return Samples(*(graphs.run(model, loop.kind, loop, inputs) if captured else loop(*inputs)))


GRAPH_LENGTHS = 16
"""How many different prefix lengths may have a graph of their own."""


@dataclass(frozen=True)
class _Loop:
    """The decode loop as a function of tensors: a step of a plan after the other, by one model or two."""

    models: list[Backbone]
    sampler: Sampler
    sizes: tuple[int, ...]
    prefix_steps: int
    joint: JointDecoding | None = None

    @property
    def kind(self) -> Hashable:
        return self.sampler, self.sizes, self.prefix_steps

    def __call__(
        self,
        label_B: Tensor,
        guidance_B: Tensor | None,
        order_BL: Tensor,
        uniform_BL: Tensor,
        given_BL: Tensor,
        kept_rank_BL: Tensor,
    ) -> tuple[Tensor, ...]:
        """Codes and their log-probabilities (B, L) in raster order and, with `joint`, what was accepted."""
        condition, plan = Condition(label_B, guidance_B), Plan(order_BL, self.sizes)
        decoders = [_Decoder(each, condition, plan, self.sampler, given_BL, self.prefix_steps) for each in self.models]
        steps: list[tuple[Tensor, ...]] = []
        done = sum(self.sizes[: self.prefix_steps])
        for index in range(self.prefix_steps, len(self.sizes)):
            rank = slice(done, done + self.sizes[index])
            step = self._choose([decoder.next_logp(index) for decoder in decoders], uniform_BL, rank)
            kept_Bn, kept_as = kept_rank_BL[:, rank], (given_BL[:, rank], 0.0, True)
            steps.append(tuple(drawn.where(~kept_Bn, kept) for drawn, kept in zip(step, kept_as, strict=False)))
            done = rank.stop
            if done < order_BL.shape[1]:
                for decoder in decoders:
                    decoder.feed(steps[-1][0])
        return _in_raster_order(plan, given_BL, steps)

    def _choose(self, logp: list[Tensor], uniform_BL: Tensor, rank: slice) -> tuple[Tensor, ...]:
        """The codes of a step, their log-probabilities and, with `joint`, what was accepted."""
        if self.joint is None:
            return sample_inverse_cdf(logp[0], uniform_BL[:, rank])
        return self.joint.rule(logp[0], logp[1], uniform_BL[:, rank], self.joint.spare_BL[:, rank])


def _rollout_waves(
    model: SlotDecoder,
    condition: Condition,
    plan: Plan,
    sampler: Sampler,
    uniform_BL: Tensor,
    given: tuple[Tensor, Tensor],
    captured: bool,
) -> Samples:
    """ZipAR: every open row of the grid in each step. Raster order, so ranks are positions."""
    (codes_BL, kept_BL), length = given, uniform_BL.shape[1]
    prefix_B = kept_BL.int().cumprod(1).sum(1)
    prefixes = prefix_B.tolist()
    waves = Waves.of(model.config.grid, sampler.window, prefixes, multiple=16 if captured else 1)
    longest, end_S = max(prefixes), waves.end_S
    if captured:  # few different shapes, for each is a graph of its own
        quarter = max(1, length // 4)
        longest, end_S = -(-longest // quarter) * quarter, (length,) * len(end_S)
    guide = _Guide(model, condition, plan, sampler)
    scale_L = torch.tensor(guide.scales, device=uniform_BL.device)
    loop = _WaveLoop(model, sampler, plan.sizes, longest, end_S)
    schedule = (each.to(uniform_BL.device) for each in (waves.position_BSn, waves.input_BSn, waves.refresh_BS))
    inputs = (condition.label_B, condition.guidance_B, uniform_BL, codes_BL, kept_BL, prefix_B, scale_L, *schedule)
    return Samples(*(graphs.run(model, loop.kind, loop, inputs) if captured else loop(*inputs)))


@dataclass(frozen=True)
class _WaveLoop:
    """The decode loop of ZipAR as a function of tensors; no step looks at slots from `end_S` of it on."""

    model: SlotDecoder
    sampler: Sampler
    sizes: tuple[int, ...]
    longest: int
    end_S: tuple[int, ...]

    @property
    def kind(self) -> Hashable:
        return self.sampler, self.sizes, self.longest, self.end_S

    def __call__(
        self,
        label_B: Tensor,
        guidance_B: Tensor | None,
        uniform_BL: Tensor,
        given_BL: Tensor,
        kept_BL: Tensor,
        prefix_B: Tensor,
        scale_L: Tensor,
        position_BSn: Tensor,
        input_BSn: Tensor,
        refresh_BS: Tensor,
    ) -> tuple[Tensor, ...]:
        length = uniform_BL.shape[1]
        plan = Plan(torch.arange(length, device=uniform_BL.device).expand(len(uniform_BL), -1), self.sizes)
        guide = _Guide(self.model, Condition(label_B, guidance_B), plan, self.sampler)
        state = self.model.prefill(guide.condition, guide.repeat(given_BL), guide.repeat(prefix_B), self.longest)
        # One column more than there are codes: what padding draws is written there.
        codes_BT = torch.cat([given_BL, given_BL[:, :1]], dim=1)
        logp_BT = torch.zeros_like(codes_BT, dtype=torch.float32)
        for index, end in enumerate(self.end_S):
            position_Bn, refresh_B1 = position_BSn[:, index], refresh_BS[:, index, None]
            live_Bn, at_Bn = position_Bn != NONE, position_Bn.clamp(min=0)
            code_Bm = codes_BT.gather(1, torch.cat([input_BSn[:, index], refresh_B1], dim=1).clamp(min=0))
            slot_Bm = torch.cat([at_Bn, (refresh_B1 + 1).clamp(min=0)], dim=1)
            writes_Bm = torch.cat([live_Bn, refresh_B1 != NONE], dim=1)
            read = map(guide.repeat, (slot_Bm, code_Bm, writes_Bm))
            hidden_BnD = self.model.run_slots(state, *read, end=end)[:, :-1]
            logp_BnV = guide.logp(hidden_BnD, scale_L[at_Bn].unsqueeze(-1))
            drawn_Bn, drawn_logp_Bn = sample_inverse_cdf(logp_BnV, uniform_BL.gather(1, at_Bn))
            into_Bn = torch.where(live_Bn & ~kept_BL.gather(1, at_Bn), at_Bn, length)
            codes_BT.scatter_(1, into_Bn, drawn_Bn)
            logp_BT.scatter_(1, into_Bn, drawn_logp_Bn.to(logp_BT.dtype))
        return codes_BT[:, :length].clone(), logp_BT[:, :length].clone()


def _kept_by_rank(plan: Plan, codes_BL: Tensor | None, kept_BL: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """The given codes and where they are kept, by generation rank, and how many leading steps are kept as a whole."""
    if codes_BL is None or kept_BL is None:
        return torch.zeros_like(plan.order_BL), torch.zeros_like(plan.order_BL, dtype=torch.bool), 0
    kept_rank_BL = kept_BL.gather(1, plan.order_BL)
    whole_S = torch.stack([ranks.all() for ranks in kept_rank_BL.split(plan.sizes, dim=1)])
    return codes_BL.gather(1, plan.order_BL), kept_rank_BL, int(whole_S.int().cumprod(0).sum())


def _in_raster_order(plan: Plan, given_BL: Tensor, steps: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What all steps drew, behind the kept prefix, put where it belongs: codes, log-probabilities and acceptance."""
    rank_BL, values = plan.rank_BL, [torch.cat(parts, dim=1) for parts in zip(*steps, strict=True)]
    prefix_BL = given_BL[:, : given_BL.shape[1] - values[0].shape[1]]
    prefixes = prefix_BL, torch.zeros_like(prefix_BL), torch.ones_like(prefix_BL)
    return tuple(
        torch.cat([prefix.to(value.dtype), value], dim=1).gather(1, rank_BL)
        for prefix, value in zip(prefixes, values, strict=False)
    )


class _Guide:
    """Guidance of a decode: the rows that the model sees, and the distribution that codes are drawn from."""

    def __init__(self, model: Backbone, condition: Condition, plan: Plan, sampler: Sampler) -> None:
        self.model, self.sampler = model, sampler
        if model.guidance_conditioned:  # the scale is an input: one pass, no null branch
            guidance_B = torch.full_like(condition.label_B, sampler.guidance, dtype=torch.float32)
            condition = condition if condition.guidance_B is not None else replace(condition, guidance_B=guidance_B)
            self.scales = (1.0,) * len(plan.sizes)
        else:
            self.scales = _scales(sampler, plan.sizes, model.guidance)
        self.guided = any(scale != 1 for scale in self.scales)
        self.condition, self.plan = with_null_branch(model, condition, plan) if self.guided else (condition, plan)

    def logp(self, hidden: Tensor, scale: float | Tensor) -> Tensor:
        """The filtered log-probabilities of a step, (B, n, V)."""
        logits = self.model.head(hidden)
        if self.guided:
            logits = apply_cfg(logits, scale)
        return log_probabilities(logits, self.sampler, self.model.nucleus)

    def repeat(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, rows]) if self.guided else rows


class _Decoder(_Guide):
    """One model's side of a decode: its cache, its guidance, its hidden states of the next step."""

    def __init__(
        self, model: Backbone, condition: Condition, plan: Plan, sampler: Sampler, given_BL: Tensor, prefix_steps: int
    ) -> None:
        super().__init__(model, condition, plan, sampler)
        self.state, self.hidden = model.start(self.condition, self.plan, self.repeat(given_BL), prefix_steps)

    def next_logp(self, index: int) -> Tensor:
        """Of the step `index`, which the codes fed so far lead to."""
        return self.logp(self.hidden, self.scales[index])

    def feed(self, codes_Bn: Tensor) -> None:
        self.hidden = self.model.step(self.state, self.repeat(codes_Bn))


def with_null_branch(model: Backbone, condition: Condition, plan: Plan) -> tuple[Condition, Plan]:
    """Stack the conditional rows and, below them, the same rows under the null label."""
    null = condition.null(model.null_label)
    guidance_B = None if condition.guidance_B is None else torch.cat([condition.guidance_B, condition.guidance_B])
    stacked = Condition(torch.cat([condition.label_B, null.label_B]), guidance_B)
    return stacked, Plan(torch.cat([plan.order_BL, plan.order_BL]), plan.sizes)


def apply_cfg(logits_2BnV: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance of stacked (conditional, null) logits: null + s (cond - null); s may be (B, n, 1)."""
    conditional, null = logits_2BnV.float().chunk(2)
    if isinstance(scale, Tensor):
        return torch.where(scale == 1, conditional, null + scale * (conditional - null))
    return conditional if scale == 1 else null + scale * (conditional - null)


def guidance_per_step(sampler: Sampler, plan: Plan, family: GuidanceKind) -> Tensor:
    """The guidance scale of every decoding step, float32 (S,); `family` is what "family" stands for.

    With g = `guidance`, N codes in S steps, and t codes decoded before a step that decodes n:

        constant        g, where g > 1; only for the first `guidance_interval` + 2 codes when that is >= 0 (LlamaGen)
        scales          1 + (g - 1) k / (S - 1) at scale k (VAR, g = cfg + 1)
        decoded_before  s0 + (g - s0) t / N, where g > 1; s0 = `guidance_start` (RandAR)
        decoded_after   1 + (g - 1) (t + n) / N (ARPG)
        power_cosine    1 + (g - 1) (1 - cos(pi (t / N)^power)) / 2, where g > 0; power = `guidance_power` (RAR)
    """
    return torch.tensor(_scales(sampler, plan.sizes, family))


@lru_cache(maxsize=256)
def _scales(sampler: Sampler, sizes: tuple[int, ...], family: GuidanceKind) -> tuple[float, ...]:
    """`guidance_per_step` as numbers."""
    kind = family if sampler.guidance_schedule == "family" else sampler.guidance_schedule
    sizes_S = torch.tensor(sizes, dtype=torch.float64)
    after_S = sizes_S.cumsum(0) / sizes_S.sum()
    before_S = after_S - sizes_S / sizes_S.sum()
    steps_S, scale = torch.arange(len(sizes_S)), float(sampler.guidance)
    if (scale <= 1 and kind in ("constant", "decoded_before")) or (scale == 0 and kind == "power_cosine"):
        return (1.0,) * len(sizes)  # the official codes switch guidance off there
    if kind == "constant":
        cut = sampler.guidance_interval >= 0
        scale_S = torch.where((steps_S > sampler.guidance_interval + 1) & cut, 1.0, torch.full_like(sizes_S, scale))
    elif kind == "scales":
        scale_S = 1 + (scale - 1) * steps_S.double() / max(1, len(sizes_S) - 1)
    elif kind == "decoded_before":
        scale_S = sampler.guidance_start + (scale - sampler.guidance_start) * before_S
    elif kind == "decoded_after":
        scale_S = 1 + (scale - 1) * after_S
    else:
        scale_S = 1 + (scale - 1) * (1 - torch.cos(math.pi * before_S**sampler.guidance_power)) / 2
    return tuple(scale_S.float().tolist())


def draw(
    logits_BnV: Tensor, sampler: Sampler, uniform_Bn: Tensor, nucleus: Nucleus = "descending"
) -> tuple[Tensor, Tensor]:
    """Codes and their log-probabilities (both (B, n)) by the inverse CDF of the filtered distribution."""
    return sample_inverse_cdf(log_probabilities(logits_BnV, sampler, nucleus), uniform_Bn)


def log_probabilities(logits_BnV: Tensor, sampler: Sampler, nucleus: Nucleus = "descending") -> Tensor:
    """The distribution that a code is drawn from: temperature, then filters; greedy is all mass on one code."""
    if sampler.temperature == 0:
        greedy = torch.full_like(logits_BnV, -torch.inf, dtype=torch.float32)
        return greedy.scatter(-1, logits_BnV.argmax(-1, keepdim=True), 0.0)
    heated = logits_BnV.float() / max(sampler.temperature, 1e-5)
    return filter_logits(heated, sampler.top_k, sampler.top_p, nucleus).log_softmax(-1)


def sample_inverse_cdf(logp_BnV: Tensor, uniform_Bn: Tensor) -> tuple[Tensor, Tensor]:
    """The code at which the CDF passes `uniform_Bn`, and its log-probability."""
    # In float64 u * total < total holds strictly, so a filtered-out code can never be reached by rounding.
    cdf = logp_BnV.double().exp().cumsum(-1)
    target = uniform_Bn.double().unsqueeze(-1) * cdf[..., -1:]
    codes_Bn1 = torch.searchsorted(cdf, target, right=True)
    return codes_Bn1.squeeze(-1), logp_BnV.gather(-1, codes_Bn1).squeeze(-1)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0, nucleus: Nucleus = "descending") -> Tensor:
    """-inf below the k-th largest logit (ties kept), then outside the nucleus of what is left.

    The nucleus by the two official rules: "descending" (LlamaGen) drops a code when the codes above it hold more than
    p; "ascending" (VAR) drops a code when it and the codes below it hold at most 1 - p, never the most likely one.
    """
    if top_k > 0:
        threshold = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p >= 1:
        return logits
    ordered, index = logits.sort(dim=-1, descending=nucleus == "descending")
    mass = ordered.softmax(-1).cumsum(-1)
    if nucleus == "descending":
        dropped = F.pad(mass[..., :-1], (1, 0)) > top_p  # the mass strictly before each code
    else:
        dropped = mass <= 1 - top_p
        dropped[..., -1].zero_()
    removed = torch.zeros_like(dropped).scatter(-1, index, dropped)
    return logits.masked_fill(removed, -torch.inf)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the former mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

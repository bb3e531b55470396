"""Whose prefixes: one class for each way to come by sequences.

    Data               the images' own codes                       DAgger's and everyone's starting point
    Rollout            the student (or the teacher) samples        GKD, f-DISTILL, SeqKD
    MixtureSampling           every code from the teacher or the student  MiniLLM (Gu et al. 2023, 2306.08543)
    SpeculativeSampling        the student proposes, the teacher vetoes    SKD (Xu et al. 2024, 2410.11325)
    MixedRollout       data prefix, student continuation           VarKD (2606.06078, eq. 6), Pozzi et al. 2025
    ScheduledSampling  data with student codes mixed in           Bengio et al. 2015, 1506.03099
    ParallelSampling   the same in one pass per round              TIE-KD (2305.08096) feeds back the argmax
    Completions        teacher continuations nearest to the data   Seq-Inter (Kim & Rush 2016, 1606.07947)

Sequences are sampled by whole steps of the plan: codes of one step (a scale, a parallel set) never see each other.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from varkd.distill.inputs import Cost, Prefixes, StepInputs, filtered, told
from varkd.distill.logspace import log_mixture, log_softmax
from varkd.distill.schedule import Schedule, check_range, value_of, words
from varkd.distill.scores import chunks
from varkd.distill.spaces import CODEBOOK, CodebookTables
from varkd.errors import VarkdError
from varkd.rollout import JointDecoding, Sampler, evaluating, filter_logits, rollout, sample_inverse_cdf
from varkd.types import Batch, Condition, Context, Part, Plan, Source


@dataclass(frozen=True)
class Data(Prefixes):
    """The images' own codes: teacher forcing."""

    kind: Literal["data"] = "data"

    @property
    def summary(self) -> str:
        return "the images' own codes"

    @property
    def runs_models(self) -> bool:
        return False

    @property
    def sources(self) -> tuple[Source, ...]:
        return ("data",)

    def __call__(self, batch: Batch, inputs: StepInputs) -> Context:
        plan = inputs.student.plan(len(batch), inputs.rng, batch.row_B)
        part = Part.of("data", batch.codes_BL, batch.condition, plan, batch.row_B)
        return Context((replace(part, sequence_B=batch.sequence_B),))


class _Sampled(Prefixes):
    """Sequences that are decoded by one sampler, in whole or in part."""

    sampler: Sampler

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        return (self.sampler,)


class _Drawn(_Sampled):
    """Sequences whose every code is drawn under a known law."""

    def no_reward(self, source: Source) -> str | None:
        del source
        return filtered(self.sampler)


@dataclass(frozen=True)
class Rollout(_Drawn):
    """Sequences that the student (or the teacher) samples now, for the labels of the batch."""

    by: Literal["student", "teacher"] = "student"
    sampler: Sampler = Sampler()
    kind: Literal["rollout"] = "rollout"
    label: ClassVar[str] = "{by} samples"

    @property
    def summary(self) -> str:
        return f"sequences that the {self.by} samples now, for the labels of the batch{told(self.sampler)}"

    @property
    def cost(self) -> Cost:
        return Cost.decode(self.by, self.sampler)

    @property
    def needs_teacher(self) -> bool:
        return self.by == "teacher"

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.by,)

    def __call__(self, batch: Batch, inputs: StepInputs) -> Context:
        plan = self.sampler.plan(inputs.student, inputs.rng, batch.row_B)
        uniform_BL = inputs.rng.uniform(f"rollout/{self.by}", batch.row_B, plan.order_BL.shape[1])
        samples = rollout(inputs.model(self.by), batch.condition, plan, self.sampler, uniform_BL)
        part = Part.of(self.by, samples.codes_BL, batch.condition, plan, batch.row_B)
        return Context((replace(part, behavior_logp_BL=samples.logp_BL),))


@dataclass(frozen=True)
class _TwoModels(_Drawn):
    """Student and teacher decode the same sequences in lock-step; subclasses say whose code is taken."""

    sampler: Sampler = Sampler()

    def __post_init__(self) -> None:
        if self.sampler.parallel != "off":
            raise VarkdError("two models decode together one code after the other: use sampler.parallel=off")

    @property
    def cost(self) -> Cost:
        return Cost.decode("student", self.sampler) + Cost.decode("teacher", self.sampler)

    @property
    def needs_teacher(self) -> bool:
        return True

    @abstractmethod
    def choose(
        self, student_BnV: Tensor, teacher_BnV: Tensor, uniform_Bn: Tensor, spare_Bn: Tensor
    ) -> tuple[Tensor, ...]:
        """Codes (B, n), the log-probability of each under the whole procedure and, perhaps, the proposals accepted."""

    def __call__(self, batch: Batch, inputs: StepInputs) -> Context:
        plan = self.sampler.plan(inputs.student, inputs.rng, batch.row_B)
        length = plan.order_BL.shape[1]
        uniform_BL, spare_BL = (inputs.rng.uniform(name, batch.row_B, length) for name in ("propose", "resample"))
        joint = JointDecoding(inputs.model("teacher"), self.choose, spare_BL)
        samples = rollout(inputs.student, batch.condition, plan, self.sampler, uniform_BL, joint=joint)
        part = Part.of("student", samples.codes_BL, batch.condition, plan, batch.row_B)
        return Context((replace(part, behavior_logp_BL=samples.logp_BL, accept_BL=samples.accept_BL),))


@dataclass(frozen=True)
class MixtureSampling(_TwoModels):
    """Every code comes from the teacher with probability `alpha`, else from the student (MiniLLM's mixed sampling).

    It is drawn from the mixture alpha p + (1 - alpha) q at once, which is the same law and has the log-probability
    that importance weights need.
    """

    alpha: Schedule = 0.2
    kind: Literal["mixture_sampling"] = "mixture_sampling"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("mixture_sampling", "alpha", self.alpha, 0, 1)

    @property
    def summary(self) -> str:
        return (
            f"sequences in which each code is drawn from the teacher with probability {words(self.alpha)}, else from "
            f"the student{told(self.sampler)}"
        )

    def choose(
        self, student_BnV: Tensor, teacher_BnV: Tensor, uniform_Bn: Tensor, spare_Bn: Tensor
    ) -> tuple[Tensor, ...]:
        del spare_Bn
        return sample_inverse_cdf(log_mixture(teacher_BnV, student_BnV, value_of(self.alpha)), uniform_Bn)


@dataclass(frozen=True)
class SpeculativeSampling(_TwoModels):
    """The student proposes each code; one outside the teacher's `top_k` / `top_p` set is drawn again from the teacher.

    For image codes the set is better given by mass than by count: the 25 likeliest of 16,384 codes may hold little of
    it. The stored log-probability is that of the whole procedure: q(x) [x in set] + (1 - q(set)) p(x).
    """

    top_k: int = 0
    top_p: float = 0.9
    kind: Literal["speculative_sampling"] = "speculative_sampling"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.top_k >= 0 and 0 < self.top_p <= 1) or (self.top_k == 0 and self.top_p == 1):
            raise VarkdError(
                "speculative_sampling: need top_k > 0 or top_p in (0, 1), "
                f"got top_k {self.top_k} and top_p {self.top_p}"
            )

    @property
    def summary(self) -> str:
        sets = [f"first {self.top_k} codes"] if self.top_k else []
        sets += [f"nucleus of mass {words(self.top_p)}"] if self.top_p < 1 else []
        return (
            f"sequences that the student proposes code by code, and whose codes outside the teacher's "
            f"{' and '.join(sets)} are drawn again from the teacher{told(self.sampler)}"
        )

    def choose(
        self, student_BnV: Tensor, teacher_BnV: Tensor, uniform_Bn: Tensor, spare_Bn: Tensor
    ) -> tuple[Tensor, ...]:
        allowed_BnV = ~torch.isneginf(filter_logits(teacher_BnV, self.top_k, self.top_p))
        proposed_Bn, _ = sample_inverse_cdf(student_BnV, uniform_Bn)
        accept_Bn = allowed_BnV.gather(-1, proposed_Bn.unsqueeze(-1)).squeeze(-1)
        codes_Bn = torch.where(accept_Bn, proposed_Bn, sample_inverse_cdf(teacher_BnV, spare_Bn)[0])
        accepted_BnV = student_BnV.masked_fill(~allowed_BnV, -torch.inf)
        rejected_Bn1 = student_BnV.exp().masked_fill(allowed_BnV, 0).sum(-1, keepdim=True)
        law_BnV = torch.logaddexp(accepted_BnV, rejected_Bn1.log() + teacher_BnV)
        return codes_Bn, law_BnV.gather(-1, codes_Bn.unsqueeze(-1)).squeeze(-1), accept_Bn


@dataclass(frozen=True)
class MixedRollout(_Sampled):
    """The first part of a data sequence, continued by the student or the teacher: VarKD's mixed rollouts.

    How many codes are kept is drawn for each row, uniformly between the shares `low` and `high` of the sequence, and
    cut to whole steps of the plan: a raster prefix (LlamaGen), a random set that the rest follows in random order
    (ARPG, RandAR, RAR), the leading scales (VAR). The part remembers which positions were generated.
    """

    low: Schedule = 0.25
    high: Schedule = 0.75
    sampler: Sampler = Sampler()
    by: Literal["student", "teacher"] = "student"
    kind: Literal["mixed_rollout"] = "mixed_rollout"
    shown: ClassVar[tuple[str, ...]] = ("low", "high", "by")

    def __post_init__(self) -> None:
        check_range("mixed_rollout", "low", self.low, 0, 1)
        check_range("mixed_rollout", "high", self.high, 0, 1)

    @property
    def summary(self) -> str:
        return (
            f"mixed rollouts: the first part of a data sequence, between {words(self.low)} and {words(self.high)} of "
            f"it, continued by the {self.by}{told(self.sampler)}"
        )

    @property
    def cost(self) -> Cost:
        # What every row keeps is read in one pass.
        return Cost.decode(self.by, self.sampler, 1 - value_of(self.low))

    @property
    def needs_teacher(self) -> bool:
        return self.by == "teacher"

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.by,)

    def no_reward(self, source: Source) -> str | None:
        del source
        return "their first codes come from the data"

    def __call__(self, batch: Batch, inputs: StepInputs) -> Context:
        plan = self.sampler.plan(inputs.student, inputs.rng, batch.row_B)
        low, high = value_of(self.low), value_of(self.high)
        share_B1 = low + (high - low) * inputs.rng.uniform("restart", batch.row_B, 1)
        uniform_BL = inputs.rng.uniform("rollout/restart", batch.row_B, plan.order_BL.shape[1])
        kept_BL = leading(plan, share_B1)
        samples = rollout(
            inputs.model(self.by), batch.condition, plan, self.sampler, uniform_BL, batch.codes_BL, kept_BL
        )
        part = Part.of(self.by, samples.codes_BL, batch.condition, plan, batch.row_B)
        return Context((replace(part, behavior_logp_BL=samples.logp_BL, generated_BL=~kept_BL),))


@dataclass(frozen=True)
class ScheduledSampling(_Sampled):
    """Data sequences in which every code is, with probability `share`, one that the student sampled in its place.

    Sequential: the student sees the codes that were mixed in before. The data's codes stay the targets everywhere.
    """

    share: Schedule = 0.25
    sampler: Sampler = Sampler()
    kind: Literal["scheduled_sampling"] = "scheduled_sampling"

    @property
    def summary(self) -> str:
        return (
            f"data sequences in which each code is, with probability {words(self.share)}, one that the student sampled "
            f"in its place, one after the other{told(self.sampler)}; the data's codes stay the targets everywhere"
        )

    @property
    def cost(self) -> Cost:
        return Cost.decode("student", self.sampler)

    @property
    def splices(self) -> bool:
        return True

    def __post_init__(self) -> None:
        check_range("scheduled_sampling", "share", self.share, 0, 1)

    def __call__(self, batch: Batch, inputs: StepInputs) -> Context:
        plan, length = self.sampler.plan(inputs.student, inputs.rng, batch.row_B), batch.codes_BL.shape[1]
        kept_BL = inputs.rng.uniform("coins", batch.row_B, length) >= value_of(self.share)
        uniform_BL = inputs.rng.uniform("rollout/scheduled", batch.row_B, length)
        samples = rollout(inputs.student, batch.condition, plan, self.sampler, uniform_BL, batch.codes_BL, kept_BL)
        part = Part.of("student", samples.codes_BL, batch.condition, plan, batch.row_B)
        return Context((replace(part, supervision_BL=batch.codes_BL),))


@dataclass(frozen=True)
class ParallelSampling(Prefixes):
    """Scheduled sampling without a decode: predictions made from the former prefix, for all positions at once.

    Each of `rounds` feeds the sequence of the round before to the student (the first one: the data), lets it predict
    every code, and puts a `share` of them into the data sequence. `greedy` takes the likeliest codes instead of
    samples. With `with_data` the data and all rounds are parts of the context, else only the last round.
    """

    share: Schedule = 0.25
    rounds: int = 1
    greedy: bool = False
    with_data: bool = False
    kind: Literal["parallel_sampling"] = "parallel_sampling"

    @property
    def summary(self) -> str:
        what = "likeliest code" if self.greedy else "sample"
        often = f", {self.rounds} times over" if self.rounds > 1 else ""
        beside = "; data and all rounds are trained on" if self.with_data else ""
        return (
            f"data sequences in which each code is, with probability {words(self.share)}, the student's {what}, "
            f"predicted for all positions at once{often}{beside}; the data's codes stay the targets everywhere"
        )

    @property
    def cost(self) -> Cost:
        return Cost(student_read=float(self.rounds), rows=self.rounds + 1.0 if self.with_data else 1.0)

    @property
    def splices(self) -> bool:
        return True

    def __post_init__(self) -> None:
        check_range("parallel_sampling", "share", self.share, 0, 1)
        if self.rounds < 1:
            raise VarkdError(f"parallel_sampling: rounds must be at least 1, got {self.rounds}")

    @property
    def sources(self) -> tuple[Source, ...]:
        return ("data", "student") if self.with_data else ("student",)

    def __call__(self, batch: Batch, inputs: StepInputs) -> Context:
        plan = inputs.student.plan(len(batch), inputs.rng, batch.row_B)
        parts = [Part.of("data", batch.codes_BL, batch.condition, plan, batch.row_B)]
        for turn in range(self.rounds):
            streams = (
                inputs.rng.uniform(f"{name}/{turn}", batch.row_B, batch.codes_BL.shape[1])
                for name in ("propose", "coins")
            )
            uniform_BL, coin_BL = streams
            proposed_BL = self._predict(parts[-1], inputs, uniform_BL)
            codes_BL = torch.where(coin_BL < value_of(self.share), proposed_BL, batch.codes_BL)
            part = Part.of("student", codes_BL, batch.condition, plan, batch.row_B)
            parts.append(replace(part, supervision_BL=batch.codes_BL))
        return Context(tuple(parts if self.with_data else parts[-1:]))

    @torch.no_grad()
    def _predict(self, part: Part, inputs: StepInputs, uniform_BL: Tensor) -> Tensor:
        """The student's code for every position, given the codes of `part` before it."""
        with evaluating(inputs.student):
            hidden_ND = inputs.student(part.codes_BL, part.condition, part.plan).flatten(0, 1)
        uniform_N, found = uniform_BL.flatten(), []
        for rows in chunks(len(hidden_ND), inputs.chunk_rows):
            logp_NV = log_softmax(inputs.student.head(hidden_ND[rows]))
            found.append(logp_NV.argmax(1) if self.greedy else _pick_rows(logp_NV, uniform_N[rows]))
        return torch.cat(found).view(part.codes_BL.shape)


@dataclass(frozen=True)
class Completions(_Sampled):
    """Of `count` teacher continuations of a data prefix, the one nearest to the image's own.

    Distance: the sum over positions of the squared distance between codebook vectors. The prefix is the share `prefix`
    of the sequence, cut to whole steps.
    """

    count: int = 4
    prefix: Schedule = 0.5
    sampler: Sampler = Sampler()
    kind: Literal["completions"] = "completions"
    shown: ClassVar[tuple[str, ...]] = ("count", "prefix")

    def __post_init__(self) -> None:
        check_range("completions", "prefix", self.prefix, 0, 1)
        if self.count < 1:
            raise VarkdError(f"completions: count must be at least 1, got {self.count}")

    @property
    def summary(self) -> str:
        return (
            f"of {self.count} continuations by the teacher of the first {words(self.prefix)} of a data sequence, the "
            f"one nearest to the image's own{told(self.sampler)}"
        )

    @property
    def cost(self) -> Cost:
        return Cost.decode("teacher", self.sampler, self.count * (1 - value_of(self.prefix)))

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def sources(self) -> tuple[Source, ...]:
        return ("teacher",)

    def prepare(self, codebook_VE: Tensor) -> CodebookTables:
        return {CODEBOOK: codebook_VE.detach().float()}

    def __call__(self, batch: Batch, inputs: StepInputs) -> Context:
        plan, length = self.sampler.plan(inputs.student, inputs.rng, batch.row_B), batch.codes_BL.shape[1]
        kept_BL = leading(plan, torch.full((len(batch), 1), value_of(self.prefix), device=batch.codes_BL.device))
        uniforms = [inputs.rng.uniform(f"complete/{nth}", batch.row_B, length) for nth in range(self.count)]
        scales = None if batch.guidance_B is None else batch.guidance_B.repeat(self.count)
        condition = Condition(batch.label_B.repeat(self.count), scales)
        plans = Plan(plan.order_BL.repeat(self.count, 1), plan.sizes)
        gold, kept = batch.codes_BL.repeat(self.count, 1), kept_BL.repeat(self.count, 1)
        model = inputs.model("teacher")
        samples = rollout(model, condition, plans, self.sampler, torch.cat(uniforms), gold, kept)
        codebook_VE = inputs.codebook_tables[CODEBOOK]
        distance_M = (codebook_VE[samples.codes_BL] - codebook_VE[gold]).square().sum((1, 2))
        nearest_B = distance_M.view(self.count, -1).argmin(0)
        codes_BL = samples.codes_BL.view(self.count, len(batch), -1)[nearest_B, torch.arange(len(batch))]
        return Context((Part.of("teacher", codes_BL, batch.condition, plan, batch.row_B),))


def leading(plan: Plan, share_B1: Tensor) -> Tensor:
    """Bool (B, L): the positions of the leading steps that hold at most `share_B1` of the sequence."""
    sizes_S = torch.tensor(plan.sizes, dtype=torch.float32, device=share_B1.device)
    done_S = sizes_S.cumsum(0) / sizes_S.sum()
    return done_S[plan.step_BL] <= share_B1


def _pick_rows(logp_NV: Tensor, uniform_N: Tensor) -> Tensor:
    return sample_inverse_cdf(logp_NV.unsqueeze(1), uniform_N.unsqueeze(1))[0].squeeze(1)

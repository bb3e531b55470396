"""What is published of each model's samples under ADM's evaluator, 50,000 of them: values only, no torch.

`fid` repeats what the official repository states (as the zoo does), or the paper where it states none; the other
numbers say where they stand. "repository" is the official README; "paper" was read in other papers' tables that quote
it, two or more agreeing unless marked "one quote". None: not found.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """FID, Inception Score, precision and recall of one setting; `source` says who states which."""

    fid: float
    inception_score: float | None
    precision: float | None
    recall: float | None
    source: str
    paper_fid: float | None = None


_REPO, _MIXED = "repository", "FID: repository; the rest: paper"
_QUOTE = "FID: repository; the rest: paper, one quote"
_PRECISION_RECALL_QUOTE = "FID: repository; IS: paper; precision and recall: paper, one quote"

PUBLISHED: dict[str, Published] = {
    "LlamaGen-B-256": Published(5.46, 193.6, 0.83, 0.45, _PRECISION_RECALL_QUOTE),
    "LlamaGen-B-384": Published(6.09, None, None, None, _REPO),
    "LlamaGen-L-256": Published(3.80, 248.3, 0.83, 0.51, _PRECISION_RECALL_QUOTE),
    "LlamaGen-L-384": Published(3.07, 256.1, 0.83, 0.52, _MIXED),
    "LlamaGen-XL-384": Published(2.62, 244.1, 0.80, 0.57, _MIXED),
    "LlamaGen-XXL-384": Published(2.34, 253.9, 0.80, 0.59, _MIXED),
    "LlamaGen-3B-384": Published(2.18, 263.3, 0.81, 0.58, _MIXED),
    "VAR-d16": Published(3.55, 274.4, 0.84, 0.51, _PRECISION_RECALL_QUOTE, 3.30),
    "VAR-d20": Published(2.95, 302.6, 0.83, 0.56, _QUOTE, 2.57),
    "VAR-d24": Published(2.33, 312.9, 0.82, 0.59, _MIXED, 2.09),
    "VAR-d30": Published(1.97, 323.1, 0.82, 0.59, _MIXED, 1.92),
    "VAR-d36": Published(2.63, 303.2, None, None, "FID: repository; IS: paper, one quote", 2.63),
    "ARPG-L": Published(2.44, 292.0, None, None, _REPO),
    "ARPG-XL": Published(2.10, 331.0, None, None, _REPO),
    "ARPG-XXL": Published(1.94, 340.0, None, None, _REPO),
    "RandAR-L-llamagen": Published(2.65, 249.0, 0.82, 0.56, _REPO, 2.55),
    "RandAR-L-maskgit": Published(2.47, 271.0, 0.84, 0.54, _REPO),
    "RandAR-XL-llamagen": Published(2.27, 275.0, 0.81, 0.59, _REPO, 2.25),
    "RAR-B": Published(1.95, 290.5, 0.82, 0.58, _QUOTE),
    "RAR-L": Published(1.70, 299.5, 0.81, 0.60, _QUOTE),
    "RAR-XL": Published(1.50, 306.9, 0.80, 0.62, _PRECISION_RECALL_QUOTE),
    "RAR-XXL": Published(1.48, 326.0, 0.80, 0.63, _PRECISION_RECALL_QUOTE),
}

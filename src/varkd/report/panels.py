"""The two pictures on the page of an analysis: groups of codes, and continuations of data prefixes."""

from __future__ import annotations

from varkd.report.analysis import Analysis
from varkd.report.images import pictures_of
from varkd.report.readings import Section, plain


def codebook(found: Analysis) -> Section:
    about = found.info["codebook"]
    (picture,) = pictures_of([found.folder / "codebook.png"], 1, share=0.4)
    return Section(
        "D19",
        "Groups of codes",
        "What is lost when look-alike codes count as one?",
        f"Images, what they decode to from their {about['codes']:,} codes, the same with every code "
        f"replaced by the mean of its group (k-means, {about['groups']:,} groups, the largest of "
        f"{about['largest_group']} codes), the last one the absolute difference, four times enlarged.",
        f"The two decodes agree to {plain(about['psnr'])} dB (PSNR). VarKD compares teacher and student over these "
        "groups only; where the rows look different, its groups are too coarse for this codebook.",
        picture=picture,
    )


def continuations(found: Analysis) -> Section:
    about = found.info["continuations"]
    (picture,) = pictures_of([found.folder / "continuations.png"], 1, share=0.6)
    rows = [
        (
            f"{row['model']}, {row['kept']:.0%} kept",
            f"confidence {plain(row['confidence'])}, teacher's -log p {plain(row['teacher_nll'])} nats",
        )
        for row in about["rows"]
    ]
    free, most = (
        next(row for row in about["rows"] if row["model"] == "student" and row["kept"] == share)
        for share in (0.0, 0.75)
    )
    return Section(
        "D20",
        "Continuations",
        "How far must a data prefix go to keep samples near the data?",
        "Each column continues one image from a share of its codes; kept codes are tinted (next-scale models keep the "
        f"leading scales, which tint nothing). Numbers are means over generated codes of {about['num']} images: the "
        "teacher's confidence 1 - H(p) / ln V, and its -log p of the codes.",
        f"The teacher's -log p of the student's codes goes from {plain(free['teacher_nll'])} nats on free-running "
        f"samples to {plain(most['teacher_nll'])} nats with three quarters of the codes kept.",
        rows=rows,
        picture=picture,
    )

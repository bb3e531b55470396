"""Every context of the library under one name: what `Method.contexts` may be."""

from __future__ import annotations

from varkd.distill.mixture import Mixture, Single
from varkd.distill.reweighted import PrefixReweighted, Reweighted

Contexts = Single | Mixture | Reweighted | PrefixReweighted

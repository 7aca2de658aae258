"""Objectives: pure functions of the views' embeddings, (B, D) or (S, B, D), computed in fp32."""

from fastssl.objectives.barlow_twins import barlow_twins_loss, barlow_twins_terms
from fastssl.objectives.byol import byol_loss, momentum_at
from fastssl.objectives.simclr import simclr_loss
from fastssl.objectives.supervised import cross_entropy_loss
from fastssl.objectives.total import total_loss
from fastssl.objectives.vicreg import vicreg_loss, vicreg_terms

__all__ = [
    "barlow_twins_loss",
    "barlow_twins_terms",
    "byol_loss",
    "cross_entropy_loss",
    "momentum_at",
    "simclr_loss",
    "total_loss",
    "vicreg_loss",
    "vicreg_terms",
]

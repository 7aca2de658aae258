"""Objectives: pure functions of the views' embeddings z, (B, D) or (S, B, D), computed in fp32.

barlow_twins.py, vicreg.py, simclr.py, byol.py, sigreg.py, visreg.py, supervised.py    one objective each
total.py      TotalLoss: the recipe's objective plus beta times the KL to the prior
metrics.py    what training logs next to the loss: accuracy, sigma and KL, RankMe
batch.py      what several objectives share: stacking the views, random directions, products over the batch

To add an objective:

1. recipe.py: a subclass of ObjectiveConfig with its `name`, its keys and their defaults, and the values of num_views,
   needs_labels and has_projector that differ; of SlicedConfig, if it projects onto random directions. Add it to
   AnyObjective.
2. objectives/NAME.py: the loss as a pure function of tensors, and NAME_terms(views, config), which returns the weighted
   terms by the names under which they are logged; they sum to the loss. With a SlicedConfig it also takes directions.
3. objectives/total.py: one line in TERMS.
"""

from fastssl.objectives.barlow_twins import barlow_twins_loss
from fastssl.objectives.byol import byol_loss
from fastssl.objectives.sigreg import sigreg_loss
from fastssl.objectives.simclr import simclr_loss
from fastssl.objectives.supervised import cross_entropy_loss
from fastssl.objectives.total import TotalLoss
from fastssl.objectives.vicreg import vicreg_loss
from fastssl.objectives.visreg import visreg_loss

__all__ = [
    "TotalLoss", "barlow_twins_loss", "byol_loss", "cross_entropy_loss", "sigreg_loss", "simclr_loss", "vicreg_loss",
    "visreg_loss",
]  # fmt: skip

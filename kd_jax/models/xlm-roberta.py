"""Describes the family XLM-R (Conneau et al. 2019, arXiv:1911.02116): RoBERTa of many tongues."""

import dataclasses

from kd_jax.models import roberta
from kd_jax.models.family import classes

FAMILY = dataclasses.replace(
    roberta.FAMILY,
    name="xlm-roberta",
    architectures=classes("XLMRoberta", "mlm", "classification", "span"),
    keys=roberta.FAMILY.keys | {"vocab_size": ("vocab_size", 30522)},
)

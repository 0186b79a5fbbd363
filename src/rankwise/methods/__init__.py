"""The registry: one line per method. Tests, command line and documentation read it."""

from __future__ import annotations

from rankwise.method import Method
from rankwise.methods.adalora import AdaLoRA
from rankwise.methods.apollo import Apollo
from rankwise.methods.apollo_mini import ApolloMini
from rankwise.methods.cuttlefish import Cuttlefish
from rankwise.methods.dense import Dense
from rankwise.methods.dion import Dion
from rankwise.methods.factor_decay import FactorDecay
from rankwise.methods.factorized import Factorized
from rankwise.methods.fira import Fira
from rankwise.methods.frugal import Frugal
from rankwise.methods.galore import GaLore
from rankwise.methods.ldadam import LDAdam
from rankwise.methods.lora import LoRA
from rankwise.methods.lora_plus import LoRAPlus
from rankwise.methods.lte import LTE
from rankwise.methods.multi_head_galore import MultiHeadGaLore
from rankwise.methods.pufferfish import Pufferfish
from rankwise.methods.qgalore import QGaLore
from rankwise.methods.relora import ReLoRA
from rankwise.methods.sifd import SIFD
from rankwise.methods.tracked import Tracked

METHODS: dict[str, type[Method]] = {
    "adalora": AdaLoRA,
    "apollo": Apollo,
    "apollo-mini": ApolloMini,
    "cuttlefish": Cuttlefish,
    "dense": Dense,
    "dion": Dion,
    "factor-decay": FactorDecay,
    "factorized": Factorized,
    "fira": Fira,
    "frugal": Frugal,
    "galore": GaLore,
    "ldadam": LDAdam,
    "lora": LoRA,
    "lora-plus": LoRAPlus,
    "lte": LTE,
    "multi-head-galore": MultiHeadGaLore,
    "pufferfish": Pufferfish,
    "qgalore": QGaLore,
    "relora": ReLoRA,
    "sifd": SIFD,
    "tracked": Tracked,
}

__all__ = [
    "LTE",
    "METHODS",
    "SIFD",
    "AdaLoRA",
    "Apollo",
    "ApolloMini",
    "Cuttlefish",
    "Dense",
    "Dion",
    "FactorDecay",
    "Factorized",
    "Fira",
    "Frugal",
    "GaLore",
    "LDAdam",
    "LoRA",
    "LoRAPlus",
    "MultiHeadGaLore",
    "Pufferfish",
    "QGaLore",
    "ReLoRA",
    "Tracked",
]

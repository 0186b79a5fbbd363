"""Low-rank updates of dense layers that stay in the model: W + s U V, with one or many heads."""

from rankwise.layers.adapted.chunks import Chunks
from rankwise.layers.adapted.initial import DRAWS, draw_update
from rankwise.layers.adapted.layer import AdaptedLayer, sum_of_products

__all__ = ["DRAWS", "AdaptedLayer", "Chunks", "draw_update", "sum_of_products"]

"""Low-rank updates of weights that stay in the model: opened, merged, restarted, closed."""

from rankwise.updates.merging import merge_
from rankwise.updates.opening import Opening, adapt, scale_from_alpha
from rankwise.updates.run import Updates
from rankwise.updates.subspaces import HeadBases

__all__ = ["HeadBases", "Opening", "Updates", "adapt", "merge_", "scale_from_alpha"]

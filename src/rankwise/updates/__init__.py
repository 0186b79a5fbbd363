"""Low-rank updates of weights that stay in the model: opened, merged, restarted, closed."""

from rankwise.updates.merging import merge_
from rankwise.updates.opening import Opening, adapt, scale_from_alpha
from rankwise.updates.run import Updates

__all__ = ["Opening", "Updates", "adapt", "merge_", "scale_from_alpha"]

"""Low-rank updates as adapters of PEFT, written and read without it."""

from rankwise.integrations.peft.exporting import export_peft
from rankwise.integrations.peft.importing import import_peft

__all__ = ["export_peft", "import_peft"]

"""From image files to pixels. Imports no torch: processes that decode start at once."""

"""Texts: as one stream of tokens, as documents without end, and in pairs for translation."""

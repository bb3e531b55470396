"""Tokenizers: images <-> codes. No labels and no training here."""

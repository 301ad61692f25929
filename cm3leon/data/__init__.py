"""Documents from corpora, and their split into train, validation and held-out."""

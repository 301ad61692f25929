"""A world where the truth is known: scenes drawn by seed, their pictures, words about them, and a parser."""

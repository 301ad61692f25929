"""Image tokenizers: pixels to a grid of codes and back."""

"""Text and images to ids and back (paper section 2.1)."""

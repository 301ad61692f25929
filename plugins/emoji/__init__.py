"""OpenMoji's drawings with their names: pictures and words that no one here made; docs/emoji.md has
what was learned.

catalogue.py     what there is: captions, and tone, gender, subject and kind of each drawing, read from its name
drawings.py      pixels, drawn once and kept; which drawings are equal
splits.py        which drawings and edits are kept from training
edits.py         pairs of drawings that an instruction leads from one to the other
source.py        emoji, emoji_edits                 corpora: captioned drawings, instructions to change one
nearest.py       the measure: which of all drawings an image, or a caption, comes closest to
protocols.py     emoji                              what models are asked, and how it is scored
"""

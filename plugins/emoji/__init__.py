"""Drawings of emojis with their names: pictures and words that were not made for this project.

    styles.py        OpenMoji's drawings and other sets: whose they are, where their files lie
    sets.py          one drawing of each set, read in the form in which it is published
    catalogue.py     what there is: captions, and what each drawing's name says about it
    drawings.py      pixels, drawn once and kept; which drawings are equal
    splits.py        which drawings and edits are held out from training
    edits.py         pairs of drawings, and the instruction that turns one into the other
    source.py        the corpora emoji and emoji_edits
    nearest.py       the measure: the drawing that an image, or a caption, comes closest to
    protocols.py     the protocol emoji: what models are asked, and how it is scored

What was learned with them is in docs/emoji.md.
"""

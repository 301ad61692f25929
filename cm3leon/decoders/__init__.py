"""From logits to tokens: guidance, processors, grammars and the engine (paper section 3.2).

Read `engine.py` first; `lanes.py` is one sample in it, `choosing.py` how its tokens are chosen.
"""

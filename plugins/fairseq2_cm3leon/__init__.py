"""fairseq2 (https://github.com/facebookresearch/fairseq2) and CM3Leon: the decoder from its blocks,
and back.

`model.name=fairseq2_cm3leon` is the decoder built of fairseq2's modules. It needs the extra
`cluster`; without it the name is known, and building the model says what is missing.
docs/fairseq2.md is the page on it.

    guard.py       imports fairseq2, or says in a sentence why not
    model.py       the decoder as a component: registers it
    attention.py   xformers as the attention of fairseq2's models
    convert.py     weights under either's names
    extension.py   what fairseq2 finds by its entry point: families, hubs
    __main__.py    cards, recipes, a training by fairseq2's Trainer, and its weights as files of ours

Modules whose names begin with `_` import fairseq2 at their top, and are imported when it is needed:
`_network` (the decoder as a TransformerLM), `_sdpa` (attention by xformers at fairseq2's plug
point), `_families`, `_tokenizer`, `_dataset` and `_cards` (what the extension registers), `_recipe`
(its recipe).
"""

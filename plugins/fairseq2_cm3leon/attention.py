"""xformers' attention for users of fairseq2."""

from __future__ import annotations

from cm3leon.plugins.fairseq2_cm3leon import guard


def use_xformers() -> None:
    """Let models of fairseq2 that are created from now on use xformers' attention wherever it runs,
    see `XformersSDPA`.

    Raises:
        UserError: if fairseq2 cannot be used.
    """
    guard.load()
    from fairseq2.models.transformer import set_default_sdpa_factory

    from cm3leon.plugins.fairseq2_cm3leon._sdpa import XformersSDPA

    set_default_sdpa_factory(XformersSDPA)

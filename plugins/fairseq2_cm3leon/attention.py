"""xformers as fairseq2's attention, for its users."""

from __future__ import annotations

from cm3leon.plugins.fairseq2_cm3leon import guard


def use_xformers() -> None:
    """Gives models of fairseq2 that are made from now on xformers' attention, where it runs; see
    `XformersSDPA`.

    Raises:
        UserError: where fairseq2 cannot be used.
    """
    guard.load()
    from fairseq2.models.transformer import set_default_sdpa_factory

    from cm3leon.plugins.fairseq2_cm3leon._sdpa import XformersSDPA

    set_default_sdpa_factory(XformersSDPA)

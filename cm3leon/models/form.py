"""How transformers names the weights of a decoder: one table for both directions.

Weights only move and change their names, so the way there and back is exact. The rows of a matrix of ours may be
those of several matrices there:

    blocks.0.qkv.weight (3D, D)  <->  q_proj.weight, k_proj.weight, v_proj.weight (D, D) of layer 0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cm3leon.models.base import Model
from cm3leon.types import UserError

TOLERANCE = 1e-5
"""Largest difference allowed between the logits of both forms, in units of the largest logit or of 1."""
LAYERS_COMPUTED = 2
"""Layers whose logits are compared: all layers are named alike, and the rest would only take memory."""


@dataclass(frozen=True)
class Form:
    """A class of transformers that computes what a decoder of ours computes."""

    name: str
    """The registered name of the decoder."""
    model_class: str
    config_class: str
    layer: str
    """Where its layers are, in front of their numbers."""
    outer: Mapping[str, str]
    """Our names of what stands outside the layers, and its names."""
    inner: Mapping[str, tuple[str, ...]]
    """A parameter of our layer, and those that its rows are split into."""
    fixed: Mapping[str, Any]
    """Settings that make one of its models this decoder."""
    to_config: Callable[[Any, int], dict[str, Any]]
    """Arguments of its config, from a decoder's config and its number of ids."""
    from_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    """The inverse; UserError for a shape that no decoder of ours has."""
    defaults: Mapping[str, Any]
    """Of its config, for what a config.json leaves out."""
    unused_rows: Mapping[str, int] = field(default_factory=dict)
    """Rows of zeros at the top of its tables that are not ours, by our name."""
    earlier: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of names in files that earlier versions of the library wrote, and what stands
    there now."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Smallest settings of the parts of its model that are not the decoder."""

    @property
    def model_type(self) -> str:
        """Its name in config.json."""
        return str(self.fixed["model_type"])

    def read_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the decoder's config, from a config.json that may leave out defaults.

        Raises:
            UserError: for a shape that no decoder of ours has, or a setting that is missing.
        """
        try:
            return self.from_config({**self.defaults, **settings})
        except KeyError as error:
            raise UserError(f"{error.args[0]} is missing") from error

    def present(self, name: str) -> str:
        """The present name of a tensor, whichever version wrote its file."""
        for before, now in self.earlier.items():
            if name.startswith(before):
                return now + name.removeprefix(before)
        return name

    def named(self, layer: int, name: str) -> str:
        """Its name of something in a layer."""
        return f"{self.layer}.{layer}.{name}"

    def to_state(self, state: Mapping[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
        """The decoder's weights under its names, one after the other, in their own precision.

        A mapping that reads tensors from files when they are asked for is read once, a layer at a time.
        """
        for ours, theirs in self.outer.items():
            weight, rows = state[ours], self.unused_rows.get(ours, 0)
            yield (
                theirs,
                torch.cat([weight.new_zeros(rows, weight.shape[1]), weight]) if rows else weight,
            )
        for layer in range(config.layers):
            for ours, names in self.inner.items():
                parts = split_rows(state[f"blocks.{layer}.{ours}"], len(names), config)
                for theirs, part in zip(names, parts, strict=True):
                    yield self.named(layer, theirs), part.contiguous()

    def from_state(self, theirs: Mapping[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
        """Its weights under the decoder's names; the inverse of `to_state`."""
        for ours, name in self.outer.items():
            yield ours, theirs[name][self.unused_rows.get(ours, 0) :]
        for layer in range(layers):
            for ours, names in self.inner.items():
                parts = [theirs[self.named(layer, name)] for name in names]
                yield f"blocks.{layer}.{ours}", torch.cat(parts) if len(parts) > 1 else parts[0]

    def build(self, theirs: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Any:
        """Its model with those weights, in evaluation mode.

        Loaded, not built: below version 5, transformers fails to initialise norms without weights.

        Args:
            settings: of its config.json.
        """
        library = transformers()
        config = getattr(library, self.config_class).from_dict(dict(settings))
        model_class = getattr(library, self.model_class)
        return model_class.from_pretrained(None, config=config, state_dict=dict(theirs)).eval()

    def logits(self, model: Any, ids_BT: Tensor) -> Tensor:
        """The logits (B, T, V) of its model: hidden states times its head, as a Chameleon's own closes image codes.

        The mask is said aloud: left to itself, the library may take a <pad> inside a sequence for padding.
        """
        hidden_BTD = model.model(
            input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)
        ).last_hidden_state
        return model.lm_head(hidden_BTD)


def split_rows(weight: Tensor, count: int, config: Any) -> tuple[Tensor, ...]:
    """The matrices whose rows make up a weight: itself, or queries, keys and values.

    Args:
        config: of the decoder; where it has `kv_heads`, keys and values may have fewer rows.
    """
    if count == 1:
        return (weight,)
    kv_heads = getattr(config, "kv_heads", None)
    kv_rows = kv_heads * config.head_size if kv_heads else config.width
    return weight.split([config.width, kv_rows, kv_rows])


@torch.inference_mode()
def verify(
    form: Form,
    model: Model,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    id_there_V: Tensor | None = None,
) -> None:
    """Compare the logits of a decoder's first layers with those of its other form, for random ids, in float32.

    Args:
        model: the decoder's shape; it may be on the meta device.
        ours: weights by our names, read when they are asked for.
        theirs: weights by the names of the other form, read likewise.
        settings: of the other form's config.json.
        id_there_V: the id in the other form of each of our ids in use; None = the same.

    Raises:
        RuntimeError: if they are not the same up to rounding.
    """
    config: Any = model.config
    config = replace(config, layers=min(config.layers, LAYERS_COMPUTED), attention="auto")
    with torch.device("meta"):
        first: Any = type(model)(config, vocab_size=model.vocab_size)
    first.load_state_dict({name: ours[name].float() for name in first.state_dict()}, assign=True)
    names = [name for name, _ in form.to_state(first.state_dict(), config)]
    cut = {**settings, **form.extra, "num_hidden_layers": config.layers}
    cut = {key: value for key, value in cut.items() if key not in ("dtype", "torch_dtype")}
    with _silent():  # of parts that are no decoder, whose weights are drawn here
        other = form.build({name: theirs[name].float() for name in names}, cut)

    id_there_V = torch.arange(model.vocab_size) if id_there_V is None else id_there_V
    shape = (2, min(config.seq_len, 64))
    ids_BT = torch.randint(len(id_there_V), shape, generator=torch.Generator().manual_seed(0))
    ours_BTV = first.eval()(ids_BT)[..., : len(id_there_V)]
    theirs_BTV = form.logits(other, id_there_V[ids_BT])[..., id_there_V]
    difference = float((ours_BTV - theirs_BTV).abs().max())
    allowed = TOLERANCE * max(1.0, float(ours_BTV.abs().max()))
    if not difference <= allowed:  # so that NaN does not pass
        raise RuntimeError(
            f"the logits of the two forms differ by {difference:.2g}, {allowed:.2g} is allowed"
        )


@contextmanager
def _silent() -> Iterator[None]:
    """The library without its bars and warnings."""
    log = transformers().utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def transformers() -> Any:
    """The library, imported when it is needed: it is large, and nothing else asks for it."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "export needs the package transformers; install it with: pip install transformers"
        ) from error
    return transformers

"""How transformers names the weights of a model: one table for both directions.

Weights only move and change their names, so exporting and importing again is exact. One of our
matrices may hold the rows of several of theirs:

    ours                              theirs
    embedding.weight      (V, D)      model.embed_tokens.weight            (V, D)
    blocks.0.qkv.weight   (3D, D)     model.layers.0.self_attn.q_proj.weight   (D, D)
                                      model.layers.0.self_attn.k_proj.weight   (D, D)
                                      model.layers.0.self_attn.v_proj.weight   (D, D)

In this file "ours" are names and weights of this project, "theirs" those of transformers.
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
"""Largest difference allowed between the logits of both, relative to the largest logit or 1."""
LAYERS_COMPUTED = 2
"""Layers that the comparison computes. All layers are named alike, and more would cost memory."""


@dataclass(frozen=True)
class Form:
    """A class of transformers that computes the same as one of our models."""

    name: str
    """The registered name of our model."""
    model_class: str
    config_class: str
    layer: str
    """Prefix of the names in a layer, before the layer's number."""
    outer: Mapping[str, str]
    """Weights outside the layers: our name -> theirs."""
    inner: Mapping[str, tuple[str, ...]]
    """Weights of a layer: our name -> their names, each of which takes a part of our rows."""
    fixed: Mapping[str, Any]
    """Settings without which the class computes something else."""
    to_config: Callable[[Any, int], dict[str, Any]]
    """(our config, number of ids) -> arguments of their config class."""
    from_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    """The inverse; it raises UserError for a shape that our model does not have."""
    defaults: Mapping[str, Any]
    """Settings of their config that a config.json may leave out."""
    unused_rows: Mapping[str, int] = field(default_factory=dict)
    """By our name: rows of zeros at the top of their table, which ours does not have."""
    earlier: Mapping[str, str] = field(default_factory=dict)
    """Prefixes of names in files of earlier versions of transformers -> present prefixes."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Smallest settings of the other parts of their model, such as its image tokenizer."""

    @property
    def model_type(self) -> str:
        """The `model_type` in config.json."""
        return str(self.fixed["model_type"])

    def read_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Translate a config.json, which may leave out defaults, into fields of our config.

        Raises:
            UserError: for a shape that our model does not have, or a missing setting.
        """
        try:
            return self.from_config({**self.defaults, **settings})
        except KeyError as error:
            raise UserError(f"{error.args[0]} is missing") from error

    def present(self, name: str) -> str:
        """Return a tensor's present name, whichever version of transformers wrote its file."""
        for before, now in self.earlier.items():
            if name.startswith(before):
                return now + name.removeprefix(before)
        return name

    def named(self, layer: int, name: str) -> str:
        """Return their full name of a weight of a layer."""
        return f"{self.layer}.{layer}.{name}"

    def to_state(self, state: Mapping[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield our weights under their names, one after the other, in their own precision.

        Each of our weights is read once, layer by layer, so `state` may be a mapping that reads
        tensors from files on access.
        """
        for ours, theirs in self.outer.items():
            weight, rows = state[ours], self.unused_rows.get(ours, 0)
            if rows:
                weight = torch.cat([weight.new_zeros(rows, weight.shape[1]), weight])
            yield theirs, weight

        for layer in range(config.layers):
            for ours, names in self.inner.items():
                parts = split_rows(state[f"blocks.{layer}.{ours}"], len(names), config)
                for theirs, part in zip(names, parts, strict=True):
                    yield self.named(layer, theirs), part.contiguous()

    def from_state(self, theirs: Mapping[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
        """Yield their weights under our names; the inverse of `to_state`."""
        for ours, name in self.outer.items():
            yield ours, theirs[name][self.unused_rows.get(ours, 0) :]

        for layer in range(layers):
            for ours, names in self.inner.items():
                parts = [theirs[self.named(layer, name)] for name in names]
                yield f"blocks.{layer}.{ours}", torch.cat(parts) if len(parts) > 1 else parts[0]

    def build(self, theirs: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Any:
        """Build their model with the given weights, in evaluation mode.

        `from_pretrained` is used rather than the class itself, because transformers below version 5
        fails to initialise norms that have no weights.

        Args:
            theirs: weights by their names.
            settings: of their config.json.
        """
        library = transformers()
        config = getattr(library, self.config_class).from_dict(dict(settings))
        model_class = getattr(library, self.model_class)
        return model_class.from_pretrained(None, config=config, state_dict=dict(theirs)).eval()

    def logits(self, model: Any, ids_BT: Tensor) -> Tensor:
        """Compute the logits (B, T, V) of their model as hidden states times head.

        A Chameleon's own `forward` sets the logits of image codes to the lowest number. The mask is
        given because transformers may otherwise take a <pad> inside a sequence for padding.
        """
        hidden_BTD = model.model(
            input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)
        ).last_hidden_state
        return model.lm_head(hidden_BTD)


def split_rows(weight: Tensor, count: int, config: Any) -> tuple[Tensor, ...]:
    """Split a weight into their matrices: one, or three for queries, keys and values.

    Args:
        weight: one of ours.
        count: 1 or 3.
        config: of our model; where it has `kv_heads`, keys and values may have fewer rows.
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
    """Compare the logits of both forms: the first layers, on random ids, in float32.

    Args:
        form: of the model.
        model: our model, whose shape alone is used; it may be on the meta device.
        ours: weights by our names, read on access.
        theirs: weights by their names, read on access.
        settings: of their config.json.
        id_there_V: their id for each of our ids in use; None = the same ids.

    Raises:
        RuntimeError: if the logits differ by more than rounding.
    """
    config: Any = model.config
    config = replace(config, layers=min(config.layers, LAYERS_COMPUTED), attention="auto")
    with torch.device("meta"):
        first: Any = type(model)(config, vocab_size=model.vocab_size)
    first.load_state_dict({name: ours[name].float() for name in first.state_dict()}, assign=True)

    # Their model is cut to the same layers. Its other parts draw weights, of which it would warn.
    names = [name for name, _ in form.to_state(first.state_dict(), config)]
    cut = {**settings, **form.extra, "num_hidden_layers": config.layers}
    cut = {key: value for key, value in cut.items() if key not in ("dtype", "torch_dtype")}
    with _silent():
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
    """Silence the progress bars and warnings of transformers."""
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
    """Import transformers, which is large and which nothing else needs.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "export needs the package transformers; install it with: pip install transformers"
        ) from error
    return transformers

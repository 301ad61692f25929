"""What requests are checked against: the model that is served, and the limits."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from cm3leon.api import CM3Leon
from cm3leon.serve.asked import Asked, ChatAsked, ImagesAsked
from cm3leon.serve.desk import Desk
from cm3leon.serve.errors import Refusal
from cm3leon.types import UserError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may take."""

    body_bytes: int = 16 * 2**20
    """Bytes of a request."""
    pixels: int = 16_000_000
    """Pixels of an image that is given."""
    samples: int = 16
    """Images of a request."""
    documents: int = 16
    """Retrieved documents of a request."""
    requests: int = 256
    """Requests in work."""


@dataclass(frozen=True)
class Setting:
    """The model under its name, the desk that asks it, and the limits."""

    desk: Desk
    limits: Limits
    name: str

    @property
    def model(self) -> CM3Leon:
        """The model, to be looked at; it is asked at the desk."""
        return self.desk.service.model

    @property
    def size(self) -> int:
        """Pixels of a side of an image."""
        return int(self.model.run.image_tokenizer.image_size)

    @property
    def image_size(self) -> str:
        """The same as OpenAI writes it."""
        return f"{self.size}x{self.size}"

    def check_name(self, name: str) -> None:
        """Raises Refusal for a model that is not served."""
        if name != self.name:
            raise Refusal(404, f"model is {name!r}; this server has {self.name!r}", param="model")

    def check(self, asked: Asked) -> None:
        """Check a request against the limits, and give it a seed where it has none.

        Raises:
            Refusal: for another model.
            UserError: for more than there may be.
        """
        if asked.model is not None:
            self.check_name(asked.model)
        if isinstance(asked, ImagesAsked):
            _check_most("n", asked.n, self.limits.samples)
            if asked.size not in ("auto", self.image_size):
                raise UserError(
                    f"size is {asked.size!r}; it must be {self.image_size}, which the model draws, or auto"
                )
        if isinstance(asked, ChatAsked):
            room = self.desk.service.engine.engine.shape.prefix
            _check_most("max_tokens", asked.longest, room)
        _check_most("retrieve", getattr(asked, "retrieve", 0), self.limits.documents)
        if asked.seed is None:
            asked.seed = secrets.randbits(32)


def _check_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise UserError(f"{name} is {value}; it must be at most {most}")

"""What requests are checked against: the served model, and the limits."""

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
    """The most that requests may take."""

    body_bytes: int = 16 * 2**20
    """Bytes of a request."""
    pixels: int = 16_000_000
    """Pixels of a client's image."""
    samples: int = 16
    """Images of a request."""
    documents: int = 16
    """Retrieved documents of a request."""
    requests: int = 256
    """Requests that are open at a time."""


@dataclass(frozen=True)
class Setting:
    """The model's name, the desk that asks the model, and the limits."""

    desk: Desk
    limits: Limits
    name: str

    @property
    def model(self) -> CM3Leon:
        """The model, for reading its settings; requests ask it through the desk."""
        return self.desk.service.model

    @property
    def size(self) -> int:
        """Height and width of images, in pixels."""
        return int(self.model.run.image_tokenizer.image_size)

    @property
    def image_size(self) -> str:
        """The size of images as OpenAI writes it: 256x256."""
        return f"{self.size}x{self.size}"

    def check_name(self, name: str) -> None:
        """Raise Refusal for a model that is not served."""
        if name != self.name:
            raise Refusal(404, f"model is {name!r}; this server has {self.name!r}", param="model")

    def check(self, asked: Asked) -> None:
        """Check a request against the limits, and give it a seed if it has none.

        Raises:
            Refusal: for another model.
            UserError: for more than the limits allow.
        """
        if asked.model is not None:
            self.check_name(asked.model)
        if isinstance(asked, ImagesAsked):
            _check_most("n", asked.n, self.limits.samples)
            if asked.size not in ("auto", self.image_size):
                raise UserError(
                    f"size is {asked.size!r}; it must be {self.image_size}, which the model draws, "
                    "or auto"
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

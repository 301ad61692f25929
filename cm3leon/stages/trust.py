"""Which code and which files of a run's folder a command trusts; apart from `opening.py`, which
needs torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Trust:
    """Options of every command that reads settings which somebody else may have written."""

    plugins: list[str] = field(default_factory=list)
    """Plugins (.py files or package folders) to load;
    those that the run names must be among them."""
    trust: bool = False
    """Load all plugins that the run names, which runs their code."""

    @property
    def trusted_plugins(self) -> list[str] | None:
        """The plugins that may be loaded; None: all, as for `load_experiment`."""
        return None if self.trust else self.plugins


@dataclass(kw_only=True)
class Opening(Trust):
    """Options of every command that opens a run."""

    verify: bool = True
    """Compare each file with its recorded checksum before reading it;
    false saves time for large files."""

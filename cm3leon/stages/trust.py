"""Which code and which files of a run's folder a command believes, apart from `opening.py`,
which needs torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Trust:
    """Options of every command that reads settings which somebody else may have written."""

    plugins: list[str] = field(default_factory=list)
    """Plugins (.py files or package folders) to load;
    those that the run names are loaded if they are named here."""
    trust: bool = False
    """Load all plugins that the run names; their code is run."""

    @property
    def trusted_plugins(self) -> list[str] | None:
        """The plugins that may be loaded, None for all, as `load_experiment` takes them."""
        return None if self.trust else self.plugins


@dataclass(kw_only=True)
class Opening(Trust):
    """Options of every command that opens a run."""

    verify: bool = True
    """Compare each file with its recorded checksum before it is read;
    false saves the time for large files."""

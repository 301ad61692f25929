"""Components by name, and the discovery of the modules that register them.

@MODELS.register("cm3leon")
class Transformer:
    \"\"\"Decoder-only transformer.\"\"\"

    @dataclass(kw_only=True)
    class Config:
        layers: PositiveInt = 24
        \"\"\"Number of layers.\"\"\"

    def __init__(self, config: Config, *, vocab: Vocabulary) -> None: ...

MODELS.preset("cm3leon_7b", of="cm3leon", layers=32)
model = MODELS.build({"name": "cm3leon_7b"}, vocab=vocab)
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cm3leon.config import (
    Component,
    FieldDoc,
    check_config_class,
    choices,
    describe,
    from_mapping,
    summary_of,
)
from cm3leon.io import digest_of
from cm3leon.types import UserError

if TYPE_CHECKING:
    # These modules import this one, which needs them for its types only.
    from cm3leon.data.extractors import Extractor
    from cm3leon.data.source import Source
    from cm3leon.decoders.base import Decoder
    from cm3leon.evaluation.protocols.base import Protocol
    from cm3leon.launch.launchers import Launcher
    from cm3leon.loggers.base import Logger
    from cm3leon.models.attention import Attention
    from cm3leon.models.base import Model
    from cm3leon.objectives.base import Objective
    from cm3leon.retrievers.base import Retriever
    from cm3leon.tasks.base import Task
    from cm3leon.tokenizers.image.base import ImageTokenizer

T = TypeVar("T")
C = TypeVar("C", bound=type)


class PluginError(RuntimeError):
    """A plugin that could not be imported; the cause carries its own traceback."""


@dataclass(frozen=True)
class _Entry:
    cls: Any
    module: str
    defaults: Mapping[str, Any]
    preset_of: str | None


class Registry(Generic[T]):
    """Classes of one kind by name, with a nested `Config` each, built as `cls(config, **runtime)`.

    Args:
        kind: the kind in messages, such as "image tokenizer".
        plural: its plural.
        base: full name of the class `T` that all classes derive from. It is a name, because its
            module imports this one. "" = any class.
    """

    def __init__(self, kind: str, plural: str, base: str = "") -> None:
        self.kind = kind
        self.plural = plural
        self.base = base
        self._entries: dict[str, _Entry] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Return a class decorator that registers a component.

        Raises:
            TypeError: for a taken name, a class that does not derive from the base of its kind, or
                one whose `Config` is missing or unsuitable.
        """

        def add(cls: C) -> C:
            bases = [f"{each.__module__}.{each.__qualname__}" for each in cls.__mro__]
            if self.base and self.base not in bases:
                raise TypeError(
                    f"{cls.__qualname__} must derive from {self.base} to be registered as the "
                    f"{self.kind} {name}"
                )
            config_class = getattr(cls, "Config", None)
            if config_class is None:
                raise TypeError(
                    f"{cls.__qualname__} needs a nested dataclass Config to be registered as {name}"
                )
            check_config_class(config_class)
            if "name" in (field.name for field in fields(config_class)):
                raise TypeError(
                    f"{cls.__qualname__}.Config.name: that key holds the component's name; "
                    "choose another"
                )
            self._add(name, _Entry(cls, cls.__module__, {}, None))
            return cls

        return add

    def preset(self, name: str, of: str, **defaults: Any) -> None:
        """Register the class of another name again, with other (plain) default values.

        Raises:
            TypeError: for a taken name or an unknown field.
        """
        base = self._entry(of, "")
        known = [field.name for field in fields(base.cls.Config)]
        for key in defaults:
            if key not in known:
                raise TypeError(
                    f"preset {name}: {key} is not a field of {of}; {choices(key, known)}"
                )
        caller = sys._getframe(1).f_globals["__name__"]
        self._add(name, _Entry(base.cls, caller, _merged(base.defaults, defaults), of))

    def _add(self, name: str, entry: _Entry) -> None:
        if name in self._entries:
            taken = (
                f"{_origin(self._entries[name].module)}; the second is from {_origin(entry.module)}"
            )
            raise TypeError(
                f"the {self.kind} {name} is registered twice: the first is from {taken}"
            )
        self._entries[name] = entry

    def _entry(self, name: str, where: str) -> _Entry:
        if name not in self._entries:
            what = f"{where} is {name}, which" if where else str(name)
            raise UserError(
                f"{what} is not a known {self.kind}; {choices(str(name), self._entries)}"
            )
        return self._entries[name]

    def get(self, name: str) -> type[T]:
        """Return the class of that name.

        Raises:
            UserError: for an unknown name.
        """
        return self._entry(name, "").cls

    def check(self, section: Any, where: str = "", *, unfit: list[str] | None = None) -> Component:
        """Check a section `{name: ..., **fields}`, or a bare name, against the `Config` it names.

        Args:
            section: the section or the name.
            where: path of the section, for messages; "" = the kind.
            unfit: as in `config.from_mapping`.

        Raises:
            UserError: for an unknown name, or fields that the `Config` refuses.
        """
        where = where or self.kind
        section = {"name": section} if isinstance(section, str) else section
        if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
            given = "has no name" if isinstance(section, Mapping) else "is not a section"
            raise UserError(
                f"{where} {given}; it must name one {self.kind} (known: {', '.join(self.names())})"
            )

        # The fields of the section replace the defaults of a preset, and these those of the class.
        name = section["name"]
        entry = self._entry(name, f"{where}.name")
        given_fields = {key: value for key, value in section.items() if key != "name"}
        fields_of_it = _merged(entry.defaults, given_fields)
        return Component(name, from_mapping(entry.cls.Config, fields_of_it, where, unfit=unfit))

    def build(self, section: Component | Mapping[str, Any] | str, **runtime: Any) -> T:
        """Build a component.

        Args:
            section: as for `check`, or what it returned.
            runtime: objects that a config cannot hold: vocabulary, device, other components.

        Raises:
            UserError: as in `check`.
        """
        component = section if isinstance(section, Component) else self.check(section)
        return self._entry(component.name, "").cls(component.config, **runtime)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def origin(self, name: str) -> str:
        """Say where a component comes from: built-in, `plugins/NAME`, an entry point, or a path."""
        return _origin(self._entry(name, "").module)

    def preset_of(self, name: str) -> str | None:
        """Return the name whose class a preset builds; None for other components."""
        return self._entry(name, "").preset_of

    def config_class(self, name: str) -> Any:
        """Return the `Config` of a component, without the defaults of a preset."""
        return self._entry(name, "").cls.Config

    def summary(self, name: str) -> str:
        """Return a line about a component: the first paragraph of its docstring, or its preset."""
        base = self.preset_of(name)
        if base:
            return f"{base} with other defaults"
        return summary_of(self.get(name))

    def has_setting(self, name: str, key: str) -> bool:
        """Tell whether the `Config` of a component has a field of that name."""
        return key in (field.name for field in fields(self.config_class(name)))

    def describe(self, name: str) -> list[FieldDoc]:
        """Describe the fields of a component, with the defaults of a preset."""
        entry = self._entry(name, "")
        return describe(entry.cls.Config, entry.defaults)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Put `over` on top of `base`; sections in both are merged in the same way."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result


SOURCES: Registry[Source] = Registry("source", "sources", "cm3leon.data.source.Source")
IMAGE_TOKENIZERS: Registry[ImageTokenizer] = Registry(
    "image tokenizer", "image tokenizers", "cm3leon.tokenizers.image.base.ImageTokenizer"
)
RETRIEVERS: Registry[Retriever] = Registry(
    "retriever", "retrievers", "cm3leon.retrievers.base.Retriever"
)
OBJECTIVES: Registry[Objective] = Registry(
    "objective", "objectives", "cm3leon.objectives.base.Objective"
)
MODELS: Registry[Model] = Registry("model", "models", "cm3leon.models.base.Model")
ATTENTIONS: Registry[Attention] = Registry(
    "attention", "attentions", "cm3leon.models.attention.Attention"
)
DECODERS: Registry[Decoder] = Registry("decoder", "decoders", "cm3leon.decoders.base.Decoder")
TASKS: Registry[Task] = Registry("task", "tasks", "cm3leon.tasks.base.Task")
PROTOCOLS: Registry[Protocol] = Registry(
    "protocol", "protocols", "cm3leon.evaluation.protocols.base.Protocol"
)
EXTRACTORS: Registry[Extractor] = Registry(
    "extractor", "extractors", "cm3leon.data.extractors.Extractor"
)
LOGGERS: Registry[Logger] = Registry("logger", "loggers", "cm3leon.loggers.base.Logger")
LAUNCHERS: Registry[Launcher] = Registry(
    "launcher", "launchers", "cm3leon.launch.launchers.Launcher"
)

REGISTRIES = (
    SOURCES,
    IMAGE_TOKENIZERS,
    RETRIEVERS,
    OBJECTIVES,
    MODELS,
    ATTENTIONS,
    DECODERS,
    TASKS,
    PROTOCOLS,
    EXTRACTORS,
    LOGGERS,
    LAUNCHERS,
)


# -------------------------------------------------------------------------------------- discovery

BUILT_IN = (
    "tokenizers",
    "data",
    "retrievers",
    "objectives",
    "models",
    "loggers",
    "decoders",
    "tasks",
    "evaluation",
    "launch.launchers",
)

# Module name -> origin of the components in it and below it. The longest matching name counts.
_origins = {"cm3leon": "built-in"}


def _origin(module: str) -> str:
    while module not in _origins and "." in module:
        module = module.rpartition(".")[0]
    return _origins.get(module, f"module {module}")


def discover(plugins: Sequence[str | Path] = ()) -> None:
    """Import all modules that may register components.

    These are the built-in ones, `plugins/`, entry points, and at last the given paths. It may be
    called again, also with other paths; modules are imported only once.

    Raises:
        UserError: for a path that is neither a Python file nor a package, or a folder in `plugins/`
            that is not a package.
        PluginError: for a plugin that fails to import; its cause is the plugin's own error.
    """
    _import_built_in()
    _load_plugins_folder()
    for entry_point in _entry_points(tuple(sys.path)):
        _load_entry_point(entry_point)
    for path in plugins:
        _load_path(Path(path).resolve())


@cache
def _import_built_in() -> None:
    for name in BUILT_IN:
        if importlib.util.find_spec(f"cm3leon.{name.partition('.')[0]}"):
            _import_all(f"cm3leon.{name}")


@lru_cache(maxsize=8)
def _entry_points(path: tuple[str, ...]) -> tuple[importlib.metadata.EntryPoint, ...]:
    """The plugins of the packages that are installed on `sys.path`, which is read once: each of
    hundreds of packages is a folder of files."""
    return tuple(importlib.metadata.entry_points(group="cm3leon.plugins"))


def _import_all(name: str) -> None:
    """Import a module and, if it is a package, the modules below it.

    Tests are left out, and so are modules whose names begin with `_`, where a plugin keeps code for
    packages that are not always installed.
    """
    module = importlib.import_module(name)
    for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if not info.name.startswith(("test_", "_")) and info.name != "tests":
            _import_all(f"{name}.{info.name}")


def _load_plugins_folder() -> None:
    if not importlib.util.find_spec("cm3leon.plugins"):
        return
    package = importlib.import_module("cm3leon.plugins")
    for folder in sorted(_folder_of(package).iterdir()):
        if folder.is_dir() and any(folder.glob("*.py")) and not (folder / "__init__.py").is_file():
            raise UserError(
                f"plugins/{folder.name} holds Python files but no __init__.py; "
                "add one, it may be empty"
            )
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("test_") and info.name != "tests":
            with _plugin(f"cm3leon.plugins.{info.name}", f"plugins/{info.name}") as name:
                _import_all(name)


def _load_entry_point(entry_point: importlib.metadata.EntryPoint) -> None:
    distribution = (
        f" ({entry_point.dist.name} {entry_point.dist.version})" if entry_point.dist else ""
    )
    with _plugin(entry_point.module, f"entry point {entry_point.name}{distribution}") as name:
        _import_all(name)


def _load_path(path: Path) -> None:
    package_file = path / "__init__.py"
    if not path.exists():
        raise UserError(
            f"plugins: {path} does not exist; give a .py file, or a folder with an __init__.py"
        )
    if path.is_dir() != package_file.is_file() or (path.is_file() and path.suffix != ".py"):
        raise UserError(f"plugins: {path} must be a .py file or a folder with an __init__.py")
    if _is_shipped(path):
        return  # already loaded
    with _plugin(_module_name(path), str(path)) as name:
        if name not in sys.modules:
            import_file(name, package_file if path.is_dir() else path)
        _import_all(name)


def is_known_plugin(path: Path) -> bool:
    """Tell whether a plugin is one of `plugins/`, or was loaded before in this process."""
    return _is_shipped(path.resolve()) or _module_name(path.resolve()) in sys.modules


def _is_shipped(path: Path) -> bool:
    plugins = importlib.util.find_spec("cm3leon.plugins")
    folders = (plugins.submodule_search_locations if plugins else None) or ()
    return any(path.is_relative_to(Path(folder).resolve()) for folder in folders)


def _module_name(path: Path) -> str:
    """Name the module of a plugin by its whole path, since two plugins may share a file name."""
    digest = digest_of(str(path))[:8]
    return f"cm3leon_plugin_{re.sub(r'[^a-zA-Z0-9]', '_', path.stem)}_{digest}"


def import_file(name: str, file: Path) -> None:
    """Import a file, or the package of an `__init__.py`, as the module of that name."""
    folders = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _folder_of(package: ModuleType) -> Path:
    return Path(package.__path__[0])


@contextmanager
def _plugin(module: str, origin: str) -> Iterator[str]:
    """Note the origin of a module before its import, and name the plugin if the import fails."""
    _origins.setdefault(module, origin)
    try:
        yield module
    # A plugin that exits would end the run as if it had succeeded.
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"plugin {origin} failed to import: {type(error).__name__}: {error}"
        ) from error

"""All messages about a user's mistakes, read from the source files, as one list for review.

`python tests/messages.py` writes them to tests/messages.txt, a message a line, in the order of the
files and of the messages in them:

    cm3leon/paths.py: {where} is {folder}, where no folder can be made: {reason}

Braces hold what a message is filled with, as the source has it. The list has no line numbers, so
code can move without changing it. A message is what one of these is called with:

- UserError, or a class derived from it;
- a function that makes such an error of its arguments, as in `raise _not_allowed(where, value,
  "a finite number")`, which is listed as a call if a text is among its arguments; likewise a class
  whose `__init__` makes the text;
- `refuse`, or `append` of a list that is named in LISTS: mistakes that become one error together.

If a message is a name, as in `raise UserError(text)`, the texts that its function sets the name to
are listed instead. If it is a call of a function of the project, the texts which that returns are.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).resolve().parent / "messages.txt"
FOLDERS = ("cm3leon", "evaluation", "plugins")
BASE = "UserError"
LISTS = ("mistakes", "objections")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Text = tuple[str | ast.expr, ...]
"""A text by its parts: constants, and expressions that are filled in."""
Placed = tuple[int, int, Text]
"""A text with its line and column, by which the texts of a file are ordered."""


@dataclass(frozen=True)
class Message:
    """A message by its file, whose name is relative to the root, and its parts."""

    file: str
    parts: Text

    @property
    def constant(self) -> str:
        """The message with `{}` for each expression."""
        return "".join(part if isinstance(part, str) else "{}" for part in self.parts)

    @property
    def line(self) -> str:
        """The message as a line of the list, with expressions in braces."""
        shown = ""
        for part in self.parts:
            shown += part if isinstance(part, str) else f"{{{ast.unparse(part)}}}"
        return f"{self.file}: {shown}".replace("\n", "\\n")


def messages(root: Path = ROOT) -> list[Message]:
    """Collect the messages of all files in FOLDERS below the root."""
    modules = {}
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*.py")):
            modules[file.relative_to(root).as_posix()] = ast.parse(file.read_text())
    collector = _Collector(modules)

    found = []
    for file, module in modules.items():
        # A text that is reached in two ways is listed once.
        places: dict[tuple[int, int], list[Text]] = {}
        for line, column, text in collector.texts(module):
            texts = places.setdefault((line, column), [])
            if text not in texts:
                texts.append(text)
        for place in sorted(places):
            found += [Message(file, text) for text in places[place]]
    return found


def written(found: list[Message]) -> str:
    """Return the content of the list."""
    return "".join(f"{message.line}\n" for message in found)


class _Collector:
    """Finds the messages of a module, knowing the error classes and functions of all modules."""

    def __init__(self, modules: dict[str, ast.Module]) -> None:
        nodes = [node for module in modules.values() for node in ast.walk(module)]
        classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
        self._errors = _derived(classes)
        self._makers: set[str] = set()
        """Names of functions that return such an error, and of error classes with an `__init__`."""
        self._inits: list[Function] = []
        """The `__init__` of such classes, which passes a message to `super().__init__`."""
        self._writers: list[Function] = []
        """Functions that return the text of such an error."""

        functions: dict[str, list[Function]] = {}
        for node in nodes:
            if isinstance(node, Function):
                functions.setdefault(node.name, []).append(node)
                if _name(node.returns) in self._errors:
                    self._makers.add(node.name)
        for each in classes:
            for node in each.body if each.name in self._errors else ():
                if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                    self._makers.add(each.name)
                    self._inits.append(node)

        # A name that is called means the function of the same file, or else the only one there is.
        for module in modules.values():
            own = set(map(id, ast.walk(module)))
            for name in self._text_calls(module):
                known = functions.get(name, [])
                near = [function for function in known if id(function) in own]
                if near or len(known) == 1:
                    self._writers += [each for each in near or known if _returned(each)]

    def _text_calls(self, module: ast.Module) -> Iterator[str]:
        """Yield the names of functions whose results a module makes errors with."""
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and _name(node.func) in self._errors and node.args:
                given = node.args[0]
                if isinstance(given, ast.Call):
                    yield _name(given.func)

    def texts(self, module: ast.Module) -> Iterator[Placed]:
        """Yield the texts of a module, those of each function together."""
        functions = [node for node in ast.walk(module) if isinstance(node, Function)]
        for function in (module, *functions):
            for node in _own_nodes(function):
                if isinstance(node, ast.Call):
                    yield from self._of_call(node, function)
            if function in self._writers:
                yield from _returned(function)

    def _of_call(self, call: ast.Call, function: ast.Module | Function) -> Iterator[Placed]:
        """Yield the messages that a call makes, often none."""
        name = _name(call.func)
        if name in self._makers:
            yield from _worded(call)
            return
        if name == "__init__" and function in self._inits and call.args:
            yield from _worded(call.args[0])
            return
        on_list = isinstance(call.func, ast.Attribute) and _name(call.func.value) in LISTS
        refuses = isinstance(call.func, ast.Name) and name == "refuse"
        appends = on_list and name == "append"
        if not (name in self._errors or refuses or appends) or not call.args:
            return

        given = call.args[0]
        if isinstance(given, ast.List):
            for expression in given.elts:
                if not isinstance(expression, ast.Starred):
                    yield from _placed(expression)
            return

        # What stands behind a name or a call is listed in its place, if it is text.
        if isinstance(given, ast.Name):
            texts = [text for value in _assigned(function, given.id) for text in _worded(value)]
            if texts or refuses:
                yield from texts
                return
        writers = {writer.name for writer in self._writers}
        behind = isinstance(given, ast.Call) and _name(given.func) in writers
        if not (behind or refuses):
            yield from _placed(given)


def _derived(classes: list[ast.ClassDef]) -> set[str]:
    """The names of BASE and of the classes that are derived from it, directly or not."""
    known = {BASE}
    while True:
        more = {each.name for each in classes if any(_name(base) in known for base in each.bases)}
        if more <= known:
            return known
        known |= more


def _own_nodes(function: ast.Module | Function) -> Iterator[ast.AST]:
    """Yield the nodes in a function's body, but not those of functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if not isinstance(node, Function):
            yield node
            waiting += ast.iter_child_nodes(node)


def _assigned(function: ast.Module | Function, name: str) -> list[ast.expr]:
    """What a name is set to in a function."""
    values = []
    for node in _own_nodes(function):
        if isinstance(node, ast.Assign) and name in map(_name, node.targets):
            values.append(node.value)
    return values


def _returned(function: Function) -> list[Placed]:
    """The texts that a function returns."""
    texts = []
    for node in _own_nodes(function):
        if isinstance(node, ast.Return) and node.value is not None:
            texts += _worded(node.value)
    return texts


def _placed(expression: ast.expr) -> list[Placed]:
    """The texts that an expression may be, with the place of the expression."""
    line, column = expression.lineno, expression.col_offset
    return [(line, column, text) for text in _alternatives(expression)]


def _worded(expression: ast.expr) -> list[Placed]:
    """The texts that an expression may be and that have words, not only what is filled in."""
    return [placed for placed in _placed(expression) if _has_words(placed[2])]


def _has_words(text: Text) -> bool:
    return any(isinstance(part, str) for part in text)


def _alternatives(expression: ast.expr) -> list[Text]:
    """The texts that an expression may be, which are several if it holds a condition."""
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        return [(expression.value,)]
    if isinstance(expression, ast.IfExp):
        return [*_alternatives(expression.body), *_alternatives(expression.orelse)]
    if isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Add):
        pairs = product(_alternatives(expression.left), _alternatives(expression.right))
        return [(*left, *right) for left, right in pairs]
    if isinstance(expression, ast.JoinedStr):
        return [tuple(map(_part, expression.values))]
    if isinstance(expression, ast.Call):
        # A method of a text, as in `f"...".strip()`, leaves its words as they are.
        function = expression.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.JoinedStr):
            return _alternatives(function.value)
        return _of_arguments(expression)
    return [(expression,)]


def _part(value: ast.expr) -> str | ast.expr:
    """A part of an f-string, without how it is formatted."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    return value.value if isinstance(value, ast.FormattedValue) else value


def _of_arguments(call: ast.Call) -> list[Text]:
    """A call with its arguments as texts, as in `_not_allowed({where}, {value}, a number)`; an
    expression like any other if none of them has words."""
    choices = [
        _alternatives(each) for each in (*call.args, *[word.value for word in call.keywords])
    ]
    texts: list[Text] = []
    for chosen in product(*choices):
        parts: list[str | ast.expr] = [f"{ast.unparse(call.func)}("]
        for number, text in enumerate(chosen):
            parts += [", ", *text] if number else text
        texts.append((*parts, ")"))
    worded = any(_has_words(text) for choice in choices for text in choice)
    return texts if worded else [(call,)]


def _name(node: ast.AST | None) -> str:
    """The last name in `name`, `module.name` or `"name"`; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ""


if __name__ == "__main__":
    LIST.write_text(written(messages()))

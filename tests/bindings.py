"""Which names of a library's objects some code uses, and whether the library has them.

Reads the code's source: to look names up, neither a GPU nor a whole TensorRT is needed.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any


def misuses(source: Any, objects: Mapping[str, Any]) -> tuple[set[str], list[str]]:
    """What a class or function uses, and which of it the binding has not.

    Args:
        source: The class or function.
        objects: How objects are spelled there (`self._engine`) -> their classes in the binding.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(source)))
    num_arguments = {
        id(call.func): len(call.args) + len(call.keywords)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
    }
    used, wrong = set(), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = _owner(node.value, objects)
        if owner is None:
            continue
        used.add(node.attr)
        spelled = ast.unparse(node)
        if not hasattr(owner, node.attr):
            wrong.append(f"{spelled} does not exist")
        elif id(node) in num_arguments:
            number = num_arguments[id(node)]
            if not _takes(getattr(owner, node.attr), node.attr, number):
                wrong.append(f"{spelled} does not take {number} arguments")
    return used, wrong


def _owner(node: ast.AST, objects: Mapping[str, Any]) -> Any:
    """The binding's class that an expression stands for, or None if that is not known."""
    if ast.unparse(node) in objects:
        return objects[ast.unparse(node)]
    if not isinstance(node, ast.Attribute):
        return None
    found = getattr(_owner(node.value, objects), node.attr, None)
    return found if inspect.isclass(found) else None


def _takes(function: Any, name: str, num_arguments: int) -> bool:
    """Whether one of the signatures in a binding's docstring fits a call."""
    signatures = re.findall(rf"\b{name}\(self: (.*?)\) ->", function.__doc__ or "")
    if not signatures:
        return True  # a class, or a function of Python
    for signature in signatures:
        parameters = re.sub(r"\[[^\[\]]*\]|<[^<>]*>", "", signature).split(", ")[1:]
        num_required = sum("=" not in parameter for parameter in parameters)
        if num_required <= num_arguments <= len(parameters):
            return True
    return False

"""From a name, or ``module:Class``, to a class.

The engine resolves algorithms and envs by string only. A shipped one is named like its module, and its class like the
name without underscores: ``fedavg_ft`` is ``FedAvgFt`` in ``fedsim.algorithms.fedavg_ft``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from typing import Any

from fedsim.errors import ConfigError, nearest, own_code


def names(package: str, interface: type) -> list[str]:
    """The shipped names under ``package`` (``"fedsim.algorithms"``), sorted."""
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(info.name for info in modules if _shipped(package, info.name, interface) is not None)


def resolve(name: str, package: str, interface: type, kind: str) -> type[Any]:
    """The class called ``name``: a shipped one, or a user's own ``module:Class``.

    Raises:
        ConfigError: no such name, module or class, or no subclass of ``interface`` with a dataclass ``Config``.
        OwnCodeError: the user's module cannot be imported.
    """
    if ":" in name:
        return _external(name, interface, kind)
    shipped = [info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    found = _shipped(package, name, interface) if name in shipped else None
    if found is None:
        raise ConfigError([f"{kind}: unknown {kind} {name!r}{nearest(name, names(package, interface))}"])
    return found


def _shipped(package: str, name: str, interface: type) -> type[Any] | None:
    module = importlib.import_module(f"{package}.{name}")
    for attribute, value in vars(module).items():
        # Names first: to Python 3.10 an alias such as dict[str, Tensor] is a class, but none to issubclass.
        if attribute.lower() == name.replace("_", "") and inspect.isclass(value) and issubclass(value, interface):
            return value
    return None


def _external(name: str, interface: type, kind: str) -> type[Any]:
    module_name, _, class_name = name.partition(":")
    if "" in module_name.split("."):
        raise ConfigError([f"{kind}: {name!r} is not module:Class"])
    with own_code(f"{kind}={name}: import"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # Only the named module's absence is a typing mistake; a missing import inside it is the module's own.
            if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
                raise ConfigError([f"{kind}: no module {module_name!r} on the Python path (from {name!r})"]) from None
            raise
    found = getattr(module, class_name, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise ConfigError([f"{kind}: {module_name!r} has no class {class_name!r}{nearest(class_name, classes)}"])
    if not (inspect.isclass(found) and issubclass(found, interface)):
        raise ConfigError([f"{kind}: {name!r} is not a subclass of fedsim's {interface.__name__}"])
    if not (inspect.isclass(schema := getattr(found, "Config", None)) and dataclasses.is_dataclass(schema)):
        raise ConfigError([f"{kind}: {name!r} has no Config that is a dataclass"])
    return found

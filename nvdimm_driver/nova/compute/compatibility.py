# SPDX-License-Identifier: Apache-2.0
"""Check that the installed Nova is the one that this package was written for.

Most methods that the compute driver overrides are private to Nova, and any release may rename them. Python then calls
Nova's new method and never ours, without an error: with a renamed ``_cleanup_vpmems``, a hard reboot would wipe the
guest's persistent memory. So nova-compute does not start when a name of Nova that this package depends on is gone or
has another signature.

Each override has its expectation in the decorator :func:`overrides`. Each module lists the other names in
``EXPECTED``: those that it calls, sets or replaces. Names that a module reads while it is imported need no
expectation, as the import fails without them.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from nova import exception

from nvdimm_driver.nova import RELEASE

NOTHING = "nothing of this name"
ASSIGNED = "an attribute that __init__ assigns"
_RECORD = "nova_form"
"""The attribute of a method in which :func:`overrides` keeps the expected form."""
_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Expected:
    """A name of Nova that this package depends on.

    :param owner: the class or module of Nova that has the name.
    :param path: the name in its owner, such as ``_cleanup``; with dots for an attribute of an attribute.
    :param form: the form that the package is written for, as :func:`form_of` returns it.
    """

    owner: Any
    path: str
    form: str

    def difference(self) -> str | None:
        """Return one sentence on how this Nova differs, or None."""
        found = form_of(self.owner, self.path)
        if found == self.form:
            return None
        prefix = f"{self.owner.__module__}." if inspect.isclass(self.owner) else ""
        return f"{prefix}{self.owner.__name__}.{self.path}: expected {self.form}, found {found}"


def overrides(form: str) -> Callable[[_Method], _Method]:
    """Record the form of the method of Nova that the decorated method overrides.

    Write it below ``@property`` and ``@staticmethod``.

    :param form: as :func:`form_of` returns it.
    """

    def record(method: _Method) -> _Method:
        setattr(method, _RECORD, form)
        return method

    return record


def overridden(ours: type, theirs: type) -> Iterator[Expected]:
    """Yield an expectation for each attribute of a class of ours.

    An attribute without :func:`overrides` is new: its name must not exist in Nova. That finds an override without its
    decorator, and a new method of Nova that ours would override by accident.

    :param theirs: the class of Nova that ours is derived from.
    """
    for name, value in vars(ours).items():
        if name.startswith("__") and not callable(value):
            continue  # __doc__, __module__ and the like
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        yield Expected(theirs, name, getattr(function, _RECORD, NOTHING))


def expect(owner: Any, forms: Mapping[str, str]) -> Iterator[Expected]:
    """Yield an expectation for each name of a class or module of Nova that is used without an override.

    :param forms: the form of each name.
    """
    for path, form in forms.items():
        yield Expected(owner, path, form)


def form_of(owner: Any, path: str) -> str:
    """Return the form of a name in a class or module.

    It is ``(self, x, y=None)`` for a function or method, without annotations, which change nothing for callers;
    ``static (x)``; ``class (x)`` with the arguments of its constructor; ``property``; :data:`ASSIGNED`; the type's
    name for another value; or :data:`NOTHING`.
    """
    name, _, rest = path.partition(".")
    value = inspect.getattr_static(owner, name, None)
    if value is None:
        return ASSIGNED if name in _assigned(owner) else NOTHING
    if rest:
        return form_of(value, rest)
    if isinstance(value, property):
        return "property"
    if isinstance(value, staticmethod | classmethod):
        return f"{'static' if isinstance(value, staticmethod) else 'class method'} {_signature(value.__func__)}"
    if inspect.isclass(value):
        return f"class {_signature(value)}"
    return _signature(value) if callable(value) else type(value).__name__


def check_nova(expected: Iterable[Expected]) -> None:
    """Raise InvalidConfiguration, which ends nova-compute, when this Nova differs from what is expected.

    :raises nova.exception.InvalidConfiguration: it names every difference.
    """
    differences = [found for found in (each.difference() for each in expected) if found]
    if differences:
        raise exception.InvalidConfiguration(
            f"nvdimm_driver supports Nova {RELEASE}. In the installed Nova {version('nova')}, names that it depends on "
            f"are missing or different: {'; '.join(differences)}. nova-compute does not start, because instances could "
            f"lose their persistent memory: install Nova {RELEASE}, or an nvdimm_driver that supports the installed "
            "Nova"
        )


def _signature(function: Callable[..., Any]) -> str:
    """Return a signature without annotations."""
    found = inspect.signature(function)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _assigned(owner: Any) -> set[str]:
    """Return the names of the attributes that a class assigns in ``__init__``, its bases' included."""
    bases = owner.__mro__ if inspect.isclass(owner) else ()
    inits = [vars(base)["__init__"] for base in bases if inspect.isfunction(vars(base).get("__init__"))]
    return {step.argval for init in inits for step in dis.get_instructions(init) if step.opname == "STORE_ATTR"}

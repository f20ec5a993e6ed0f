# SPDX-License-Identifier: Apache-2.0
"""Plug-ins by name: installed packages register them as entry points (stevedore), and options name those to use."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from nvdimm_driver.errors import ConfigError, NvdimmError, PluginError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from oslo_config import cfg

    from nvdimm_driver.plugins import Plugin

LOG = logging.getLogger(__name__)

NAMESPACES = {
    "nvdimm_driver.drivers": ("Plugin", "[DEFAULT] driver"),
    "nvdimm_driver.xml_hooks": ("XmlHook", "[DEFAULT] xml_hooks"),
    "nvdimm_driver.backings": ("Backing", "kind of a pool"),
    "nvdimm_driver.acpi_builders": ("AcpiBuilder", "[acpi] builder"),
    "nvdimm_driver.mappers": ("Mapper", "[xen] mapper"),
}
"""The groups of entry points in which plug-ins are registered: the base class in plugins.py, the option that names one.

The base class of drivers, which this module must not know, is checked by :func:`.driver.driver_class`.
"""


def load(namespace: str, name: str, conf: cfg.ConfigOpts) -> Any:
    """Load the plug-in of that name and make it from the configuration.

    :param namespace: one of :data:`NAMESPACES`.
    :raises ConfigError: when no installed package has it, it cannot be imported, or cannot be made.
    """
    return _make(find(namespace, name), name, conf)


def find(namespace: str, name: str) -> type[Plugin]:
    """Return the class of the plug-in of that name.

    :raises ConfigError: when no installed package has it, it cannot be imported, or is not of the base class.
    """
    from stevedore import DriverManager, ExtensionManager
    from stevedore.exception import NoMatches

    try:
        manager: Any = DriverManager(namespace, name, on_load_failure_callback=_refuse)
    except NoMatches as error:
        installed: Any = ExtensionManager(namespace, on_load_failure_callback=_refuse)
        raise ConfigError(
            f"{NAMESPACES[namespace][1]}: there is no plug-in {name!r} in {namespace}",
            hint=f"installed are: {', '.join(sorted(installed.names()))}",
        ) from error
    return _checked(manager.driver, namespace, name)


def load_all(namespace: str, conf: cfg.ConfigOpts) -> list[Any]:
    """Load every plug-in of a namespace, sorted by name, and make each from the configuration.

    :raises ConfigError: when one cannot be imported, is not of the base class, or cannot be made.
    """
    from stevedore import ExtensionManager

    manager: Any = ExtensionManager(namespace, on_load_failure_callback=_refuse)
    return [_make(_checked(manager[name].plugin, namespace, name), name, conf) for name in sorted(manager.names())]


def options_of(name: str) -> list[cfg.Opt]:
    """Return the options that installed plug-ins of that name declare.

    :raises ConfigError: when one of them cannot be imported.
    """
    from importlib.metadata import entry_points

    found: list[cfg.Opt] = []
    for namespace in NAMESPACES:
        for entry in entry_points(group=namespace, name=name):
            try:
                found += entry.load().OPTIONS
            except Exception as error:
                _refuse(None, entry, error)
    return found


def _checked(found: Any, namespace: str, name: str) -> type[Plugin]:
    """Return a plug-in's class if it has the base class of its namespace and, being a backing, its own name.

    :raises ConfigError: when it has not.
    """
    from nvdimm_driver import plugins

    base = getattr(plugins, NAMESPACES[namespace][0])
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"the plug-in {name} in {namespace} is {found!r}, which is not a {base.__name__}",
            hint=f"it must be a class derived from nvdimm_driver.plugins.{base.__name__}",
        )
    if issubclass(found, plugins.Backing) and getattr(found, "name", None) != name:
        raise ConfigError(
            f"the plug-in {name} in {namespace} has the name {getattr(found, 'name', None)!r}",
            hint="a backing has the name of its entry point",
        )
    return found


def _make(plugin: type[Plugin], name: str, conf: cfg.ConfigOpts) -> Plugin:
    try:
        if plugin.OPTIONS:
            conf.register_opts(plugin.OPTIONS, group=name)
        return _guarded(plugin, name).from_conf(conf)
    except NvdimmError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the plug-in {name} ({plugin.__module__}:{plugin.__qualname__}) cannot be used: "
            f"{type(error).__name__}: {error}",
            hint="correct its options, or install a version of its package for this nvdimm_driver",
        ) from error


def _guarded(plugin: type[Plugin], name: str) -> type[Plugin]:
    """Return the class with methods that raise only errors of the driver's and of the system; others name the plug-in.

    The defaults of the base classes stay what they are, which tells what a plug-in overrides. A driver stays as it is,
    too: it is the driver's own code, but for what it overrides.
    """
    from nvdimm_driver import plugins

    bases = plugins.XmlHook, plugins.Backing, plugins.AcpiBuilder, plugins.Mapper
    if not issubclass(plugin, bases):
        return plugin
    found = {each: inspect.getattr_static(plugin, each) for each in dir(plugin) if not each.startswith("_")}
    methods = {
        each: _guard(method, f"{name} ({plugin.__module__}:{plugin.__qualname__})")
        for each, method in found.items()
        if inspect.isfunction(method) and method.__module__ != plugins.__name__
    }
    same = {"__module__": plugin.__module__, "__qualname__": plugin.__qualname__, "__doc__": plugin.__doc__}
    return types.new_class(plugin.__name__, (plugin,), exec_body=lambda body: body.update(same | methods))


def _guard(method: Callable[..., Any], plugin: str) -> Callable[..., Any]:
    def raise_named(error: Exception) -> NoReturn:
        LOG.debug("the plug-in %s has failed", plugin, exc_info=error)
        raise PluginError(
            f"the plug-in {plugin} has failed in {method.__name__}: {type(error).__name__}: {error}",
            hint="correct or remove it; with -v, or log_level DEBUG, the log has the place",
        ) from error

    def iterate(items: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from items
        except (NvdimmError, OSError):
            raise
        except Exception as error:
            raise_named(error)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            found = method(*args, **kwargs)
        except (NvdimmError, OSError):
            raise
        except Exception as error:
            raise_named(error)
        return iterate(found) if inspect.isgenerator(found) else found

    return call


def _refuse(manager: object, entry: EntryPoint, error: BaseException) -> NoReturn:
    """Raise an error that stevedore would log and ignore."""
    del manager
    raise ConfigError(
        f"the plug-in {entry.name} ({entry.value}) cannot be imported: {type(error).__name__}: {error}",
        hint="repair or remove the package that it is in",
    ) from error

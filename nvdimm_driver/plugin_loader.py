# SPDX-License-Identifier: Apache-2.0
"""Plug-ins by name: installed packages register them as entry points (stevedore), and options name those to use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from nvdimm_driver.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from oslo_config import cfg

    from nvdimm_driver.plugins import Plugin

NAMESPACES = (
    "nvdimm_driver.drivers",
    "nvdimm_driver.xml_hooks",
    "nvdimm_driver.backings",
    "nvdimm_driver.acpi_builders",
    "nvdimm_driver.mappers",
)
"""The groups of entry points in which plug-ins are registered."""


def load(namespace: str, name: str, conf: cfg.ConfigOpts) -> Any:
    """Load the plug-in of that name and make it from the configuration.

    :param namespace: one of :data:`NAMESPACES`.
    :raises ConfigError: when no installed package has it, or it cannot be imported.
    """
    return _make(find(namespace, name), name, conf)


def find(namespace: str, name: str) -> type[Plugin]:
    """Return the class of the plug-in of that name.

    :raises ConfigError: when no installed package has it, or it cannot be imported.
    """
    from stevedore import DriverManager
    from stevedore.exception import NoMatches

    try:
        manager: Any = DriverManager(namespace, name, on_load_failure_callback=_refuse)
    except NoMatches as error:
        raise ConfigError(f"no plug-in {name!r} in {namespace}", hint="look at the option that names it") from error
    found: type[Plugin] = manager.driver
    return found


def load_all(namespace: str, conf: cfg.ConfigOpts) -> list[Any]:
    """Load every plug-in of a namespace, sorted by name, and make each from the configuration.

    :raises ConfigError: when one cannot be imported.
    """
    from stevedore import ExtensionManager

    manager: Any = ExtensionManager(namespace, on_load_failure_callback=_refuse)
    return [_make(manager[name].plugin, name, conf) for name in sorted(manager.names())]


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


def _make(plugin: type[Plugin], name: str, conf: cfg.ConfigOpts) -> Plugin:
    if plugin.OPTIONS:
        conf.register_opts(plugin.OPTIONS, group=name)
    return plugin.from_conf(conf)


def _refuse(manager: object, entry: EntryPoint, error: BaseException) -> NoReturn:
    """Raise an error that stevedore would log and ignore."""
    del manager
    raise ConfigError(
        f"the plug-in {entry.name} ({entry.value}) cannot be imported: {type(error).__name__}: {error}",
        hint="repair or remove the package that it is in",
    ) from error

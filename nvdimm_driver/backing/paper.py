# SPDX-License-Identifier: Apache-2.0
"""A backing for plans on a host that a host file describes: it is examined and located, never provisioned."""

from __future__ import annotations

from collections.abc import Sequence

from nvdimm_driver.backing.devdax import no_label_server
from nvdimm_driver.backing.host_file import HostDescription
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import BackingIdentity, Extent, Intake, Location, Namespace, NvdimmSpec
from nvdimm_driver.plugins import Backing
from nvdimm_driver.sizes import human


class PaperBacking(Backing):
    """Handles every path: a namespace's device node stands for that namespace, others for a new file on a fsdax one."""

    name = "paper"

    def __init__(self, host: HostDescription) -> None:
        self.host = host

    def describe(self) -> str:
        return "plans for a described host; provisions nothing"

    def handles(self, path: str) -> bool:
        del path
        return True

    def areas(self) -> Sequence[Namespace]:
        return [each for each in self.host.namespaces if each.mode != "sector"]

    def examine(self, spec: NvdimmSpec) -> Intake:
        namespace = self.host.namespace_of(spec.path)
        is_file = spec.path != f"/dev/{namespace.device}"
        if is_file != (namespace.mode == "fsdax") or namespace.mode == "sector":
            raise BackingError(
                f"{spec.path}: {namespace.name} is in mode {namespace.mode}",
                hint="a file needs a fsdax namespace, a device node one in raw or devdax mode",
            )
        if spec.size > namespace.data_size:
            raise BackingError(
                f"{spec.path}: {human(spec.size)} do not fit {namespace.name}, which has {human(namespace.data_size)}",
                hint="ask for less, or use a larger namespace",
            )
        return Intake("fsdax" if is_file else namespace.mode, is_file, spec.size if is_file else 0, namespace)

    def locate(self, spec: NvdimmSpec) -> Location:
        namespace = self.host.namespace_of(spec.path)
        identity = BackingIdentity(self.name, namespace.uid, 0, 0, 0, namespace.data_size)
        return Location(identity, (Extent(0, namespace.data_spa, spec.size),))

    def check_labels(self, spec: NvdimmSpec) -> None:
        if self.host.namespace_of(spec.path).mode == "devdax":
            raise no_label_server(spec.path)

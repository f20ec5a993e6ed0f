"""A backing on paper: plans for a host that a file describes. It can be examined, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from nvdimm_driver.backing.identity import no_label_server
from nvdimm_driver.backing.inventory import HostDescription
from nvdimm_driver.errors import BackingError, UnsupportedError
from nvdimm_driver.model import BackingIdentity, Extent, Intake, Location, NvdimmSpec, Progress, Space
from nvdimm_driver.plugins import Backing, ByteRange, unwatched


class PaperBacking(Backing):
    """Takes every path: a namespace's device node for that namespace, any other for a new file on a fsdax one."""

    name = "paper"

    def __init__(self, host: HostDescription) -> None:
        self.host = host

    def describe(self) -> str:
        return "plans for a described host; provisions nothing"

    def handles(self, path: str) -> bool:
        del path
        return True

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
                f"{spec.path}: {spec.size} bytes do not fit {namespace.name}, which has {namespace.data_size}",
                hint="ask for less, or use a larger namespace",
            )
        return Intake("fsdax" if is_file else namespace.mode, is_file, spec.size if is_file else 0, namespace)

    def locate(self, spec: NvdimmSpec) -> Location:
        namespace = self.host.namespace_of(spec.path)
        identity = BackingIdentity(namespace.mode, namespace.uid, 0, 0, 0, namespace.data_size)
        return Location(identity, (Extent(0, namespace.data_spa, spec.size),))

    def provision(self, spec: NvdimmSpec, progress: Progress = unwatched) -> BackingIdentity:
        del progress
        raise self._refuse(spec.path)

    def space(self, paths: Sequence[str], taken: Collection[str]) -> Space:
        del taken
        raise UnsupportedError(f"{', '.join(paths)}: on paper only")

    def size(self, path: str) -> int:
        raise self._refuse(path)

    def allocate(self, spec: NvdimmSpec) -> NvdimmSpec:
        raise self._refuse(spec.path)

    def publish(self, spec: NvdimmSpec) -> None:
        raise self._refuse(spec.path)

    def fill_holes(self, spec: NvdimmSpec) -> None:
        raise self._refuse(spec.path)

    def open_bytes(self, spec: NvdimmSpec, *, write: bool = False) -> ByteRange:
        raise self._refuse(spec.path)

    def discard(self, spec: NvdimmSpec) -> None:
        raise self._refuse(spec.path)

    def freeze(self, path: str) -> None:
        raise self._refuse(path)

    def thaw(self, path: str) -> None:
        raise self._refuse(path)

    def check_labels(self, spec: NvdimmSpec) -> None:
        if self.host.namespace_of(spec.path).mode == "devdax":
            raise no_label_server(spec.path)

    def open_labels(self, spec: NvdimmSpec, identity: BackingIdentity) -> ByteRange:
        del identity
        raise self._refuse(spec.path)

    def _refuse(self, path: str) -> UnsupportedError:
        return UnsupportedError(f"{path} is on paper only", hint="leave --host away on the host itself")

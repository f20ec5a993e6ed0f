# SPDX-License-Identifier: Apache-2.0
"""The base classes of plug-ins: XML hook, backing, ACPI builder and mapper.

Imports nothing heavy: the device model, which has to start fast, uses a mapper.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod

from nvdimm_driver.host_files import real_path

TYPE_CHECKING = False  # typing.TYPE_CHECKING without the 8 ms that importing typing takes
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from typing import ClassVar, Self

    from oslo_config import cfg

    from nvdimm_driver.device_marks import DeviceMarks
    from nvdimm_driver.errors import BackingError, UnsupportedError
    from nvdimm_driver.model import (
        AcpiTables,
        BackingIdentity,
        Extent,
        GuestLayout,
        Intake,
        Location,
        Namespace,
        NvdimmSpec,
        Progress,
        Space,
        Surveyed,
        Touch,
    )


IF_LOST = "if it is lost for good, 'nvdimmctl release --lost --slot N DOMAIN' gives it up"
"""Hint for what is not there, and has its bytes still."""

DOUBTFUL = "it shared blocks with the file of a guest that ran, and may have what that guest wrote"
"""What is wrong with a file that :meth:`Backing.doubt_sharers` has noted."""


def unwatched(done: int, total: int) -> None:
    """Ignore progress."""


class Plugin(ABC):
    """The base class of all plug-ins.

    :cvar OPTIONS: the plug-in's own options, in section ``[NAME]`` of the configuration, where NAME is that of its
        entry point. They are registered when the plug-in is loaded.
    """

    OPTIONS: ClassVar[Sequence[cfg.Opt]] = ()

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        """Make a plug-in from the operator's configuration.

        :param conf: configuration with :attr:`OPTIONS` registered.
        """
        del conf
        return cls()

    @abstractmethod
    def describe(self) -> str:
        """Return one line for people: what the plug-in does and needs."""


class XmlHook(Plugin):
    """Rewrites domain XML on its way into libvirt and restores it on its way out.

    Both directions are pure, and each undoes the other. A hook gets the XML that the hooks before it returned.
    """

    @abstractmethod
    def rewrite(self, xml: str, device_model: str) -> str:
        """Return XML that libvirt's driver accepts; byte for byte the same when it has no NVDIMM.

        :param device_model: absolute path of the program that becomes the domain's emulator.
        """

    @abstractmethod
    def restore(self, xml: str) -> str:
        """Return the XML that the user wrote, or XML that means the same; unchanged when nothing was rewritten."""

    def may_restore(self, reply: bytes) -> bool:
        """Return False for a reply of libvirt without XML that :meth:`restore` would change.

        Such a reply goes to the client without being parsed. Called for every reply: must be cheap and raise nothing.
        """
        del reply
        return True


class ByteRange(ABC):
    """An open range of bytes, which stays open when this process gives up its privileges.

    :ivar size: bytes of the range. Offsets count from its start.
    :ivar identity: identity of the backing that is open, whatever its path leads to by now; None when it is not known.
    """

    size: int
    identity: BackingIdentity | None = None

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes.

        :raises BackingError: when they are not all in the range.
        """
        self._check(offset, length)
        return self._read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes; they are durable after :meth:`sync`.

        :raises BackingError: when they are not all in the range.
        :raises OSError: when they cannot be written.
        """
        self._check(offset, len(data))
        self._write(offset, data)

    @abstractmethod
    def sync(self) -> None:
        """Make written bytes durable.

        :raises OSError: when that fails.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the range."""

    @abstractmethod
    def _read(self, offset: int, length: int) -> bytes:
        """Return bytes, which are all in the range."""

    @abstractmethod
    def _write(self, offset: int, data: bytes) -> None:
        """Write bytes, which are all in the range."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check(self, offset: int, length: int) -> None:
        if not 0 <= offset <= self.size - length:
            from nvdimm_driver.errors import BackingError
            from nvdimm_driver.sizes import human

            raise BackingError(f"{human(length)} at {offset:#x} are not in a range of {human(self.size)}")


class Backing(Plugin):
    """A kind of storage for an NVDIMM's bytes in the machine's persistent memory.

    Every backing says which paths it handles (:meth:`handles`), which memory it hands out (:meth:`areas`), whether it
    can provision an NVDIMM (:meth:`examine`), and where the NVDIMM's bytes are (:meth:`locate`). All other methods have
    defaults, which suit memory that exists from the start and never moves, such as a device. A backing that makes,
    moves or reserves bytes overrides the methods for that. A backing whose bytes programs of the host can read and
    write overrides :meth:`open_bytes`: import, export and wipe need it.

    :cvar name: name of its entry point; a pool's ``kind``.
    :ivar device_marks: the owners of devices, which keep no record themselves; the driver sets it.
    """

    name: str
    device_marks: DeviceMarks | None = None

    # --- every backing implements these ---

    @abstractmethod
    def handles(self, path: str) -> bool:
        """Return True when this backing handles the path, existing or to be created (by its file type)."""

    @abstractmethod
    def areas(self) -> Sequence[Namespace]:
        """Return the parts of the machine's memory that backings of this kind are in.

        A guest gets frames of these only. No area may overlap RAM, or an area with another uid.

        :raises BackingError: when they cannot be determined.
        """

    @abstractmethod
    def examine(self, spec: NvdimmSpec) -> Intake:
        """Check that the backing can be provisioned. Change nothing.

        :raises BackingError: with the reason when it cannot.
        """

    @abstractmethod
    def locate(self, spec: NvdimmSpec) -> Location:
        """Return the identity, and the extents of the first ``spec.size`` bytes, cross-checked as far as possible.

        :raises BackingError: when bytes are missing, are shared with another backing, or are not in :meth:`areas`.
        """

    def find_extents(self, spec: NvdimmSpec) -> Sequence[Extent]:
        """Return where the first ``spec.size`` bytes are, also of a backing that no guest could start with.

        What is nowhere, such as a hole in a file, is left out.

        :raises BackingError: when that cannot be determined.
        """
        return self.locate(spec).extents

    # --- backings that are made, moved or reserved ---

    def identify(self, path: str) -> BackingIdentity:
        """Return the identity of what is at a path, whatever its size, and also when bytes are missing.

        :raises BackingError: when there is none.
        """
        return self._whole(path).identity

    def exists(self, path: str) -> bool:
        """Return True when something exists at a path.

        :raises BackingError: when nobody can say, as on a medium with errors.
        """
        return exists(path)

    def check_home(self, path: str, identity: BackingIdentity | None = None) -> None:
        """Check that what holds backings like this one is there, so that one which does not exist is gone for good.

        The default refuses: a device that is not there has its bytes still.

        :param path: of the backing.
        :param identity: that it had, if it is known.
        :raises BackingError: when it is not there: no file system is mounted, or another one.
        """
        if not self.exists(path):
            from nvdimm_driver.errors import BackingError

            hint = f"enable it; if it has another name now ('nvdimmctl host'), define the domain with that; {IF_LOST}"
            raise BackingError(f"{path}: its device is not there, and has its bytes still", hint=hint)

    def find(self, identity: BackingIdentity) -> str:
        """Return where bytes that are not at their path are now, for people; empty, the default, if nobody knows."""
        del identity
        return ""

    def size(self, path: str) -> int:
        """Return the size of an existing backing, in bytes.

        :raises NotFoundError: when it does not exist.
        :raises BackingError: when it is not fit.
        """
        return self._whole(path).identity.size

    def space(self, paths: Sequence[str], taken: Collection[str]) -> Space:
        """Return the room in a pool of this kind of backing.

        :param paths: paths of the pool.
        :param taken: paths of the NVDIMMs in it.
        :raises BackingError: when one of the pool's paths does not exist, or is not fit for this kind.
        """
        from nvdimm_driver.model import Space

        found = {path: self._whole(path) for path in map(real_path, paths)}
        free = [each.identity.size for path, each in found.items() if path not in taken]
        return Space(
            capacity=sum(each.identity.size for each in found.values()),
            free=sum(free),
            largest_free=max(free, default=0),
            alignment=min((each.extents[0].spa & -each.extents[0].spa for each in found.values()), default=0),
            namespaces=self._areas_of(found.values()),
        )

    def create(self, spec: NvdimmSpec, progress: Progress = unwatched) -> BackingIdentity:
        """Do what :meth:`provision` does, for what did not exist when it was examined; return what was created.

        A define that fails later deletes that. So refuse what has its place by now, other than an empty file. The
        default provisions it, for backings that do not create anything.

        :raises BackingError: when that cannot be done, or something has its place.
        """
        return self.provision(spec, progress)

    def provision(
        self, spec: NvdimmSpec, progress: Progress = unwatched, identity: BackingIdentity | None = None
    ) -> BackingIdentity:
        """Create or complete the backing: all of it allocated, written and synced. Can be repeated.

        On failure, remove what this call created. When the user interrupts it, keep that.

        :param progress: called now and then with the bytes written and the total.
        :param identity: what it has to be, whatever the size of a file is: nothing is created then. None for a backing
            that may be created, as in a define.
        :raises BackingError: when that cannot be done; with an identity also when something else is there, or nothing.
        """
        del progress
        found = self.locate(spec).identity
        if identity is not None and not found.is_same(identity):
            raise _is_another(spec.path)
        return found

    def discard(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        """Delete what :meth:`provision` has created, with all its bytes; by default nothing.

        :param identity: whose bytes it has to have; None when that is not known.
        :raises BackingError: when something else is there, or it cannot be deleted.
        """

    def allocate(self, spec: NvdimmSpec) -> NvdimmSpec:
        """Allocate a backing into which bytes will be copied. Can be repeated: bytes copied before stay.

        :returns: ``spec`` with the path that the backing has until :meth:`publish`; by default unchanged.
        :raises BackingError: when there is no room.
        """
        self.examine(spec)
        return spec

    def publish(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        """Move a backing of :meth:`allocate`, which :meth:`provision` has completed, to its path. Can be repeated.

        :param identity: of what was written and verified; None when that is not known.
        :raises InUseError: when something else has the path now, or was put in the place of what was written.
        """

    def fill_holes(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        """Allocate the holes of an existing backing, which :meth:`provision` refuses to do.

        :param identity: whose bytes it has to have, whatever its size is; None when that is not known.
        :raises BackingError: when there is no room, or something else is there.
        """

    def freeze(self, path: str, identity: BackingIdentity | None = None) -> None:
        """Prevent the host from moving the backing's bytes. Can be repeated.

        The default does nothing, which is right only where nothing in the host can move them.

        :param identity: whose bytes it has to have; None when that is not known.
        :raises BackingError: when something else is there, or as :meth:`check_can_freeze` does.
        :raises InUseError: while a program has it open to overwrite it.
        """

    def check_can_freeze(self, path: str, identity: BackingIdentity | None = None) -> None:
        """Check that nothing which only the operator can change keeps :meth:`freeze` from the backing.

        By default, nothing does.

        :param identity: whose bytes it has to have; None when that is not known.
        :raises BackingError: when something does, or something else is there.
        """

    def freeze_for(self, path: str, run: int | None, identity: BackingIdentity | None = None) -> None:
        """Do what :meth:`freeze` does, and record on the backing which run of a guest has it, until it is thawed.

        Like the owner's record, that shows that the ledger is older. The default records nothing.

        :param run: number of the :class:`.model.Run`; None when it is not known.
        """
        self.freeze(path, identity)

    def thaw(self, path: str, identity: BackingIdentity | None = None) -> None:
        """Undo :meth:`freeze`. Can be repeated; no error when the backing is gone, or something else is there.

        :param identity: whose bytes it has to have; None when that is not known.
        """

    def hold(self, path: str, identity: BackingIdentity) -> int | None:
        """Return a descriptor that keeps the host from taking the backing away; a process has it while a guest runs.

        The default is None: programs of the host cannot open the backing, or nothing would be kept from being done.

        :raises BackingError: when the backing has another identity, or is in use.
        """
        return None

    def written_at(self, path: str) -> int | None:
        """Return when a program of the host has last written the backing, in nanoseconds since the epoch.

        What a guest writes does not count. The default is 0, for a backing of which nobody knows; None when it is not
        there, or cannot be asked.
        """
        return 0

    def time_to_touch(self, path: str) -> int | None:
        """Return the time that a frozen backing whose guest has ended gets when it is thawed, so that backups copy it.

        It is later than the time of a copy that was made until now. What a program writes once the backing is thawed
        has another one, as has what was written before. The default is None: it keeps its time. In nanoseconds since
        the epoch.
        """
        return None

    def thaw_unless(
        self,
        path: str,
        needed: Callable[[BackingIdentity | None], bool],
        identity: BackingIdentity | None = None,
        touch: Touch | None = None,
        *,
        unmark: bool = False,
    ) -> None:
        """Undo :meth:`freeze` as :meth:`thaw` does, unless the backing is needed.

        :param needed: returns True when a start needs what is at the path, which has that identity, if any.
        :param touch: gives a frozen backing its :meth:`time_to_touch`, unless a program has written it meanwhile, or
            may be about to: a process that was killed here may have left it thawed.
        :param unmark: removes the owner's record from a frozen backing (:meth:`mark`), before it does not count as
            frozen any more: what is killed in between is repeated.
        """
        if not needed(None):
            self.thaw(path, identity)
            if unmark:
                self.mark(path, None, identity)

    def lacking(self, spec: NvdimmSpec) -> int:
        """Return how many bytes the backing is short."""
        return 0

    def extend(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        """Append zeros to a backing that is short.

        :param identity: whose bytes it has to have, whatever its size is; None when that is not known.
        """

    def shorten(self, path: str, size: int, wanted: int, identity: BackingIdentity | None = None) -> None:
        """Undo an :meth:`extend` of a backing that is not frozen: cut it off, if it still has the size that it got.

        :param size: bytes that it has.
        :param wanted: bytes that it is to have.
        :param identity: whose bytes it has to have, whatever its size is; None when that is not known.
        """

    def move(self, source: str, target: str, identity: BackingIdentity | None = None) -> None:
        """Move a backing that is not frozen to a path where nothing is.

        :param identity: whose bytes it has to have; None when that is not known.
        :raises BackingError: when that cannot be done, or something else is there.
        """
        from nvdimm_driver.errors import BackingError

        raise BackingError(f"{source}: cannot be moved to {target}", hint="it is a device")

    def check_unwritten(
        self, path: str, identity: BackingIdentity | None = None, allowed: Collection[int] = ()
    ) -> None:
        """Check that no program of the host may write a frozen backing, by what it has opened before.

        :param identity: whose bytes it has to have; None when that is not known.
        :param allowed: ids of processes that may: the guest's label server.
        :raises InUseError: when one may.
        """

    def is_shared(self, spec: NvdimmSpec) -> bool:
        """Return True when a backing shares bytes with others, such as a reflink, that :meth:`unshare` can copy.

        :raises BackingError: when that cannot be determined.
        """
        return False

    def doubt_sharers(
        self,
        path: str,
        identity: BackingIdentity | None = None,
        size: int | None = None,
        mapped: Collection[int] = (),
    ) -> Sequence[str]:
        """Note on each backing that shares bytes with a frozen one that a guest may have written to it.

        It is an error to locate, examine, provision or read these, until :meth:`trust`.

        Nothing is done if what is there is not frozen, or another one.

        :param identity: whose bytes the frozen one has to have; None when that is not known.
        :param size: bytes that the guest has, from the start on; None for all.
        :param mapped: numbers of the runs of guests: what is frozen for one of these is compared with its guest's.
        :returns: the paths of the others.
        :raises BackingError: when that cannot be done.
        """
        return ()

    def trust(self, path: str, identity: BackingIdentity | None = None) -> None:
        """Undo :meth:`doubt_sharers` for a backing.

        :param identity: whose bytes it has to have; None when that is not known.
        """

    def unshare(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        """Copy what a backing that is not frozen shares with others, such as a reflink. Can be repeated.

        No byte changes, and so :meth:`written_at` does not, after which a saved guest could not go on.

        :param identity: whose bytes it has to have; None when that is not known.
        :raises BackingError: when there is no room.
        """

    # --- the record of the owner ---

    def mark(self, path: str, owner: bytes | None, identity: BackingIdentity | None = None) -> None:
        """Record the owner on the backing itself; None removes the record.

        A frozen backing may keep the record that it has: it is written again once the backing is thawed.

        The default is for a device, on which nothing can be recorded: :attr:`device_marks` has the owner of its bytes.

        :param identity: whose bytes it has to have; None when that is not known. No record is removed from others.
        :raises BackingError: when something else is there, which is to get a record.
        :raises LedgerError: when a record of a device cannot be written.
        """
        if self.device_marks is None or (identity is not None and identity.inode):
            return
        if owner is None and identity is not None:  # wherever it is by now
            self.device_marks.set_owner(identity, None)
            return
        found = self._find_device(path)
        if found is not None and (identity is None or identity.shares_bytes(found)):
            self.device_marks.set_owner(identity or found, owner)
        elif owner is not None and identity is not None:
            raise _is_another(path)

    def note_given(self, path: str, when: int) -> None:
        """Note that the owner of a frozen backing, whose record cannot be written, was given it (again) at a time.

        Once the backing is not frozen any more, :meth:`mark` removes the note.

        :param when: nanoseconds since 1970.
        """

    def given_at(self, path: str) -> int:
        """Return the time that :meth:`note_given` has noted; 0 without one."""
        return 0

    def inspect(self, path: str, identity: BackingIdentity | None = None) -> Surveyed | None:
        """Return the owner that is recorded on the backing at a path, and whether a guest has it.

        The default does that for a device, as :meth:`mark` does; with an identity, for exactly its bytes.

        :param identity: whose bytes it has to have; None for whatever is there.
        :returns: None when nothing is there, or nothing that a domain could have; but not with an identity.
        :raises TurnedError: when a part of the path has become a symbolic link.
        :raises BackingError: when it cannot be read or, with an identity, something else is there, or nothing.
        """
        if self.device_marks is None or (identity is not None and identity.inode):
            return None
        found = self._find_device(path)
        if identity is not None and not (found and identity.shares_bytes(found)):
            raise _is_another(path)
        if found is None:
            return None
        return self._surveyed_device(path, found, self.device_marks.owner(identity or found))

    def inspect_parts(self, path: str, identity: BackingIdentity) -> Iterable[Surveyed]:
        """Return the other devices with bytes of one that have an owner recorded: its parts, or what it is a part of.

        :param path: by which the device is known.
        """
        if self.device_marks is None or identity.inode or type(self).mark is not Backing.mark:
            return ()
        found = self.device_marks.owners_of_parts(identity)
        return [self._surveyed_device(path, other, owner) for other, owner in found]

    def survey(self, paths: Sequence[str]) -> Iterable[Surveyed]:
        """Return the files in a pool with these paths, or these devices, and the owners recorded on them.

        :raises BackingError: when the pool cannot be read.
        """
        if self.device_marks is None or type(self).mark is not Backing.mark:
            return ()
        return [found for path in map(real_path, paths) if (found := self.inspect(path))]

    def _surveyed_device(self, path: str, identity: BackingIdentity, owner: bytes | None) -> Surveyed:
        from nvdimm_driver.model import Surveyed

        return Surveyed(path, owner, False, True, identity=identity)

    def _find_device(self, path: str) -> BackingIdentity | None:
        """Return the identity of the device at a path; None when none is there that a domain could have."""
        from nvdimm_driver.errors import BackingError

        try:
            found = self.identify(path) if self.handles(path) else None
        except BackingError:
            return None
        return found if found and not found.inode else None

    # --- access from the host ---

    def open_bytes(self, spec: NvdimmSpec, *, write: bool = False) -> ByteRange:
        """Open the first ``spec.size`` bytes of a backing.

        :param write: open for writing; until the range is closed, nobody else can do so, and :meth:`freeze` fails.
        :raises UnsupportedError: when programs of the host cannot read and write such a backing.
        :raises InUseError: when another program has it open for writing.
        :raises NotFoundError: when it does not exist.
        :raises BackingError: when it is smaller, or cannot be opened.
        """
        from nvdimm_driver.errors import UnsupportedError

        raise UnsupportedError(
            f"{spec.path}: the backing {self.name} cannot be read or written from the host",
            hint="read or write it in the guest",
        )

    def check_labels(self, spec: NvdimmSpec) -> None:
        """Check that :meth:`open_labels` supports such a backing, which need not be provisioned yet.

        :raises UnsupportedError: when it does not.
        """
        raise self._no_label_server(spec.path)

    def open_labels(self, spec: NvdimmSpec, identity: BackingIdentity) -> ByteRange:
        """Open the label area of an NVDIMM for writing. A frozen backing stays frozen.

        :raises UnsupportedError: as :meth:`check_labels` does.
        :raises BackingError: when the backing has another identity, or cannot be written.
        """
        raise self._no_label_server(spec.path)

    def _no_label_server(self, path: str) -> UnsupportedError:
        from nvdimm_driver.errors import UnsupportedError

        return UnsupportedError(
            f"{path}: a label server cannot write the labels of the backing {self.name} (dsm = qemu)",
            hint="take dsm 'aml', which needs no label server",
        )

    def _whole(self, path: str) -> Location:
        from nvdimm_driver.model import PAGE, NvdimmSpec

        return self.locate(NvdimmSpec(0, path, PAGE))

    def _areas_of(self, locations: Iterable[Location]) -> tuple[Namespace, ...]:
        """Return the areas that the locations are in."""
        used = {each.identity.device for each in locations}
        return tuple(each for each in self.areas() if each.uid in used)


def _is_another(path: str) -> BackingError:
    from nvdimm_driver.errors import BackingError

    return BackingError(f"{path}: is another device by now", hint="repeat what you did: look at it again")


def backing_of(backings: Sequence[Backing], path: str) -> Backing:
    """Return the first of the backings that handles this path.

    :raises BackingError: when none does.
    """
    for backing in backings:
        if backing.handles(path):
            return backing
    _check_there(path)
    from nvdimm_driver.errors import BackingError

    raise BackingError(
        f"{path}: cannot be the backing of an NVDIMM", hint="; ".join(backing.describe() for backing in backings)
    )


def exists(path: str) -> bool:
    """Return True when something exists at a path. Unlike :func:`os.path.lexists`, take no error for a "no".

    :raises BackingError: when nobody can say, as on a medium with errors.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        from nvdimm_driver.errors import BackingError

        raise BackingError(f"{path}: {error.strerror}", hint="look at the kernel's log") from error
    return True


def backing_named(backings: Sequence[Backing], name: str) -> Backing:
    """Return the backing of that name.

    :raises BackingError: when no installed package has it.
    """
    for backing in backings:
        if backing.name == name:
            return backing
    from nvdimm_driver.errors import BackingError

    raise BackingError(f"there is no backing {name!r}", hint="install the plug-in that it was made with")


def _check_there(path: str) -> None:
    """Check that a file or device is at a path, or could be.

    :raises BackingError: when its folder is missing, when it is a folder, or when the path leads nowhere.
    """
    from nvdimm_driver.errors import BackingError

    if os.path.isdir(path):
        raise BackingError(f"{path}: is a folder", hint="name a file in it, which need not exist yet")
    folder = os.path.dirname(real_path(path))
    while not os.path.lexists(folder) and not os.path.lexists(os.path.dirname(folder)):
        folder = os.path.dirname(folder)  # the first that is missing
    if not os.path.lexists(folder):
        raise BackingError(
            f"{path}: there is no folder {folder}", hint="mount the file system that it is on, or make the folder"
        )
    if not os.path.isdir(folder):
        raise BackingError(f"{path}: {folder} is not a folder", hint="correct the path")
    try:
        os.stat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise BackingError(f"{path}: {error.strerror}", hint="name a file or a device") from error


class AcpiBuilder(Plugin):
    """Makes the ACPI tables that describe its NVDIMMs to a guest."""

    @abstractmethod
    def build(self, layout: GuestLayout) -> AcpiTables:
        """Return verified tables for exactly this layout.

        :raises AcpiError: when they cannot be built, or do not match the layout.
        """


class Mapper(Plugin):
    """Maps machine frames into a guest and delivers its ACPI tables.

    Frames are plain tuples of ints: a mapping is (gfn, mfn, count), a range of the machine (mfn, count).
    """

    def close(self) -> None:
        """Close the open connections to Xen, if there are any. Can be repeated; the mapper can be used again."""

    @abstractmethod
    def ram(self) -> list[tuple[int, int]]:
        """Return the machine's RAM, as ranges of frames."""

    @abstractmethod
    def is_alive(self, domid: int, uuid: str) -> bool:
        """Return True while the hypervisor has that domain, also when it is dying."""

    @abstractmethod
    def guests(self) -> list[tuple[int, str | None]]:
        """Return every domain of the hypervisor except dom0, dying ones included, as (domid, uuid if known)."""

    @abstractmethod
    def guest_end(self, domid: int) -> int:
        """Return the first guest frame behind all frames of the domain.

        :raises XenError: when the domain is gone.
        """

    @abstractmethod
    def uuid(self, domid: int) -> str | None:
        """Return the domain's uuid as the toolstack recorded it, or None."""

    def write_back_fault(
        self,
        mappings: Sequence[tuple[int, int, int]],
        uncached: Sequence[tuple[int, int]],
        domid: int | None = None,
    ) -> str:
        """Return why :meth:`map` cannot have a guest's NVDIMMs cached; empty when it can. By default, it cannot.

        :param domid: of the guest; None while there is none.
        :raises XenError: when it cannot be determined.
        """
        return f"the mapper cannot ask for it: {self.describe()}"

    @abstractmethod
    def map(
        self, domid: int, mappings: Sequence[tuple[int, int, int]], uncached: Sequence[tuple[int, int]] = ()
    ) -> int:
        """Grant and map frames. On failure, roll back in reverse order.

        :param uncached: guest frames (gfn, count) that must not be cached: all from the first to the last, or those
            whose writer does not flush. Others are to be cached, and there are none when :meth:`write_back_fault` gives
            a reason.
        :returns: number of memory_mapping hypercalls made.
        :raises NoWriteBackError: when frames cannot be cached: the caller may try again without.
        :raises XenError: on failure.
        """

    @abstractmethod
    def unmap(
        self, domid: int, mappings: Sequence[tuple[int, int, int]], uncached: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Undo :meth:`map` with the same arguments."""

    @abstractmethod
    def deliver(self, domid: int, tables: bytes) -> None:
        """Put ACPI tables (concatenated) where the guest's firmware reads them."""

    @abstractmethod
    def read(self, domid: int, address: int, length: int) -> bytes:
        """Return bytes of the guest's RAM.

        :param address: guest-physical address.
        """

    def write(self, domid: int, address: int, data: bytes) -> None:
        """Write bytes to the guest's RAM.

        :param address: guest-physical address.
        :raises UnsupportedError: when the mapper cannot: guests cannot be restored then.
        """
        from nvdimm_driver.errors import UnsupportedError

        raise UnsupportedError(f"{self.describe()}: cannot write to the memory of domid {domid}")

    def announce(self, domid: int, mappings: Sequence[tuple[int, int, int]]) -> None:
        """Let :meth:`frames_of_guests` tell which frames a guest has, or will have; none for no mappings.

        What is announced ends with the domain. The default does nothing: the ledger alone tells who has which frames.
        """

    def frames_of_guests(self) -> list[tuple[int, int, int]]:
        """Return the announced frames of all domains that the hypervisor has, as (domid, mfn, count).

        :raises XenError: when they cannot be determined.
        """
        return []

    def copy_disk_buffers(self, domid: int) -> None:
        """Have the guest copy what its Xen disks transfer through RAM. By default, nothing is done.

        Xen grants no frame of an NVDIMM to a backend, so a disk that the guest reads or writes with a buffer in one
        would fail. Linux copies for a disk that is not ``trusted`` (xen-blkfront, since XSA-403).
        """

    def give_slots(self, domid: int, pages: bytes) -> None:
        """Give the guest the pages of its slots for hot-plug (:mod:`.guest.hot_slots`).

        :raises UnsupportedError: when the mapper cannot.
        """
        raise self._no_slots()

    def raise_slot_event(self, domid: int) -> None:
        """Raise the interrupt that has the guest look at its slots.

        :raises UnsupportedError: when the mapper cannot.
        """
        raise self._no_slots()

    def _no_slots(self) -> UnsupportedError:
        from nvdimm_driver.errors import UnsupportedError

        return UnsupportedError(
            f"{self.describe()}: a guest cannot have slots for hot-plug", hint="leave <maxMemory slots='…'> out"
        )

    @abstractmethod
    def give_dsm_page(self, domid: int) -> None:
        """Add the page to the guest through which it talks to a label server."""

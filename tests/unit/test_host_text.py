# SPDX-License-Identifier: Apache-2.0
"""Names, lines and output of the host that are not UTF-8: they disturb nothing, and are shown escaped."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from oslo_config import cfg

from nvdimm_driver import conf, conf_files, logs
from nvdimm_driver.backing import writers
from nvdimm_driver.backing.files import check_name
from nvdimm_driver.backing.inventory import mounts
from nvdimm_driver.cmd.device_model import Log
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import BackingError, ConfigError, LedgerError
from nvdimm_driver.host_text import decode, escaped, printable
from nvdimm_driver.lock_files import describe
from nvdimm_driver.model import KIB, SUPERPAGE, Pool
from nvdimm_driver.nova import conf as nova
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.processes import run
from nvdimm_driver.state.events import Event, logfmt
from nvdimm_driver.state.ledger import Ledger
from tests.unit.doubles import UUID, MemoryBacking, RecordingMapper, domain, make_driver

STRAY = b"/run/gr\xf6sse"
NAME = decode(STRAY)
SHOWN = r"/run/gr\udcf6sse"


def test_any_bytes_are_text_that_is_the_same_bytes_again() -> None:
    everything = bytes(range(256)) + "ö…".encode()
    assert decode(everything).encode("utf-8", "surrogateescape") == everything
    escaped(decode(everything)).encode()
    assert escaped("ö…") == "ö…"
    assert escaped(NAME) == SHOWN


@pytest.mark.parametrize(
    "stray", [STRAY, "/run/a\u2028b\u00a0c\u0085d\u3000e".encode(), b"/run/\r\x0b\x0c\x1c\x1d\x1e", b"/a\\040b\\012c"]
)
def test_any_name_of_a_mount_point_is_read(tmp_path: Path, stray: bytes) -> None:
    lines = b"30 1 0:27 / %s rw shared:1 - tmpfs none rw\n31 1 259:0 / /mnt/pmem0 rw - ext4 /dev/pmem0 rw,dax=always\n"
    (tmp_path / "mountinfo").write_bytes(lines % stray)
    first, second = mounts(tmp_path / "mountinfo")
    assert os.fsencode(first.directory) == stray.replace(b"\\040", b" ").replace(b"\\012", b"\n")
    assert (second.directory, second.device) == ("/mnt/pmem0", os.makedev(259, 0))


def test_what_a_program_prints_is_read() -> None:
    done = run(["sh", "-c", r"printf 'gr\366sse'; printf '\366' >&2; exit 3"])
    assert (done.stdout, done.stderr, done.returncode) == ("gr\udcf6sse", "\udcf6", 3)


@pytest.mark.parametrize("form", ["text", "json"])
def test_log_lines_show_it(tmp_path: Path, form: str) -> None:
    file = tmp_path / "nvdimm-driver.conf"
    file.write_text(f"[DEFAULT]\nlog_file={tmp_path}/hook.log\nlog_format={form}\n")
    event = Event("start-failed", UUID, "db1", None, {"error": "X", "message": NAME})
    Log(str(tmp_path / "model.log"), form)(event)
    code = (
        "import logging, sys; from nvdimm_driver import conf, logs; logs.to_file('hook', conf.load([sys.argv[1]]));"
        "logging.getLogger('nvdimm_driver').error('%s', sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(file), NAME], check=True)
    for name in ("hook.log", "model.log"):
        (line,) = (tmp_path / name).read_bytes().decode().splitlines()
        if form == "json":
            assert NAME in json.loads(line).values()
        assert "gr\\udcf6sse" in line.replace("\\\\", "\\")


def test_the_journal_shows_it() -> None:
    assert logfmt({"msg": NAME}).isascii()
    assert logs.BareFormatter().format(logging.LogRecord("x", 40, "", 0, NAME, (), None)).isascii()


def test_the_ledger_shows_it_in_events_and_faults(tmp_path: Path) -> None:
    driver = make_driver(tmp_path, MemoryBacking(), RecordingMapper())
    driver.define(domain("/mnt/pmem0/a"))
    driver.ledger.record_failure(UUID, BackingError(f"{NAME} is not mounted with DAX"))
    record = driver.ledger.find_domain(UUID)
    assert record
    assert record.fault == f"{SHOWN} is not mounted with DAX"
    assert driver.ledger.events()[-1].detail["message"] == record.fault
    driver.ledger.record_event("undefined", UUID, {"kept": NAME})
    assert driver.ledger.events()[-1].detail == {"kept": SHOWN}


def test_the_ledger_refuses_a_path_with_it(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    ledger.store(UUID, "db1", SUPERPAGE, [])
    with pytest.raises(LedgerError, match=r"cannot have '/run/gr.*udcf6sse': it is not UTF-8 \(rename the file\)"):
        ledger.begin_start(UUID, [NAME])
    assert ledger.started_domains() == ()


def test_a_file_with_it_in_a_pool_disturbs_no_check(tmp_path: Path) -> None:
    backing = MemoryBacking()
    pool = Pool("main", "memory", ("/mnt/pmem0",), None, SUPERPAGE, 128 * KIB, False)
    driver = make_driver(tmp_path, backing, RecordingMapper(), pools=Pools([pool]))
    driver.define(domain("/mnt/pmem0/a"))
    stray = decode(b"/mnt/pmem0/\xff")
    backing.files[stray] = (500, SUPERPAGE)
    assert look(driver) == []
    backing.files.pop(stray)
    backing.move("/mnt/pmem0/a", stray)
    (found,) = look(driver)
    assert found.mend
    found.mend()
    assert look(driver) == []


def test_a_path_that_is_not_utf8_is_no_domains(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    assert ledger.claimants(NAME) == ()
    ledger.close()


def test_the_hook_refuses_xml_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "nvdimm-driver.conf"
    file.write_text(f"[DEFAULT]\nlog_file={tmp_path}/log\n")
    code = f"import sys; from nvdimm_driver.cmd.hook import main; sys.exit(main(files=[{str(file)!r}]))"
    xml = b"<domain type='xen'><a>\xf6</a><x:y xmlns:x='urn:nvdimm-driver:domain:1'/></domain>"
    command = [sys.executable, "-c", code, NAME, "prepare", "begin", "-"]
    done = subprocess.run(command, input=xml, capture_output=True, check=False)
    assert done.returncode == 1
    assert "the domain XML cannot be parsed" in done.stderr.decode()
    assert f'domain="{SHOWN}"' in (tmp_path / "log").read_text()


def test_a_configuration_that_is_not_utf8_is_named_with_line_and_byte(tmp_path: Path) -> None:
    file = tmp_path / "some.conf"
    file.write_bytes(b"[DEFAULT]\n# gr\xc3\xb6sse\nstate_dir = /gr\xf6sse\n")
    for read in (conf.load, nova.read):
        with pytest.raises(ConfigError, match=rf"{file}, line 3: byte 16 is 0xf6, which is not UTF-8 \(save the file"):
            read([str(file)])


def test_the_standard_configuration_is_checked_too(tmp_path: Path) -> None:
    folder = tmp_path / "nvdimm-driver/nvdimm-driver.conf.d"
    folder.mkdir(parents=True)
    (folder / "a.conf").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"a.conf, line 1: byte 1 is 0xff"):
        conf_files.read(cfg.ConfigOpts(), "nvdimm-driver", None, etc=str(tmp_path))


@pytest.mark.parametrize("language", ["C", "C.UTF-8", "en_US.ISO-8859-1"])
def test_nvdimmctl_prints_it_escaped(tmp_path: Path, language: str) -> None:
    (tmp_path / "nvdimm-driver.conf").write_text("")
    code = (
        "import sys; from nvdimm_driver.cmd import nvdimmctl; nvdimmctl.Nvdimmctl.run = lambda app, argv: print(*argv);"
        "nvdimmctl.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, STRAY, "→"], env={"LC_ALL": language}, capture_output=True, check=True
    )
    assert done.stdout.decode().strip() in (f"{SHOWN} →", f"{SHOWN} \\u2192")


@pytest.mark.parametrize("character", ["\n", "\t", "\x1b", "\x7f", "\x9b"])
def test_a_backings_name_has_no_control_character(character: str) -> None:
    """A terminal would obey it, and a line's end would make a second line of a log or list."""
    with pytest.raises(BackingError, match=r"has a control character \(rename it"):
        check_name(f"/mnt/pmem0/a{character}b.img")


RENAMED = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\x1b[2K\\r\\nerror: x'); print(flush=True); input()"
"""A program that gives itself another name (prctl(2): PR_SET_NAME)."""


@pytest.fixture
def renamed() -> Iterator[int]:
    """The id of a process whose user has chosen its name."""
    words = [sys.executable, "-c", RENAMED]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process.pid
        process.kill()


def test_the_name_of_a_process_is_on_one_line_and_printable(renamed: int) -> None:
    for text in (describe(renamed), str(writers.refusal("/mnt/pmem0/a.img", [renamed]))):
        assert f"process {renamed} (\\x1b[2K error: x)" in text
        assert text == printable(text)
        assert "\n" not in text

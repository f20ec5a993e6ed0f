# SPDX-License-Identifier: Apache-2.0
"""Every verb of nvdimmctl: its output for scripts, and its exit status when it fails."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.model import GIB, MIB, Allocation, BackingIdentity, NvdimmSpec
from nvdimm_driver.state.ledger import Ledger

UUID = "7c7b0e2e-4a6e-4f0e-9a3b-000000000001"
VERBS = sorted(entry.name.replace("_", " ") for entry in entry_points(group="nvdimm_driver.nvdimmctl"))
FORMATS = ("table", "json", "yaml", "csv", "value")
SCHEMAS: dict[str, Any] = {
    "list": [{"Domain": str, "Slot": int, "Path": str, "Size": int, "State": str}],
    "show db1": {
        "name": str,
        "uuid": str,
        "ram": int,
        "dsm": None,
        "cache": None,
        "label_server": None,
        "holder": None,
        "state": str,
        "domid": None,
        "frozen": [],
        "last_fault": str,
        "nvdimms": [
            {
                "slot": int,
                "path": str,
                "size": int,
                "label_size": int,
                "base": int,
                "guest_base": None,
                "identity": {"kind": str, "device": str, "start": int, "inode": int, "generation": int, "size": int},
                "bad_blocks": [],
                "problem": str,
            }
        ],
    },
    "pool list": [
        {"Name": str, "Kind": str, "Capacity": None, "Free": None, "Largest free": None, "Used": int, "Health": str}
    ],
    "pool show main": {
        "name": str,
        "kind": str,
        "paths": [str],
        "capacity": None,
        "free": None,
        "largest_free": None,
        "used": int,
        "quota": int,
        "alignment": None,
        "alignsize": int,
        "label_size": int,
        "wipe_on_release": bool,
        "problems": [str],
        "namespaces": [],
        "nvdimms": [{"domain": str, "uuid": str, "slot": int, "path": str, "size": int, "state": str}],
    },
    "check": [{"Domain": str, "Path": str, "Problem": str, "Remedy": str, "Done": str}],
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A host with a pool whose folder does not exist, and a domain with an NVDIMM in it."""
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    path = f"{tmp_path}/pmem/db1.img"
    identity = BackingIdentity("fsdax", "namespace", 0, 100, 1, 64 * MIB)
    ledger.store(UUID, "db1", GIB, [Allocation(UUID, NvdimmSpec(0, path, 64 * MIB), identity, 64 * GIB)])
    ledger.close()
    file = tmp_path / "nvdimm-driver.conf"
    file.write_text(f"[DEFAULT]\nstate_dir = {tmp_path}\n[pool:main]\npaths = {tmp_path}/pmem\nquota = 1GiB\n")
    return file


def nvdimmctl(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("nvdimmctl")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert "Traceback" not in done.stderr
    return done


def fits(value: Any, schema: Any) -> bool:
    """Return True when a value has exactly the keys and types of a schema."""
    if isinstance(schema, dict):
        return value.keys() == schema.keys() and all(fits(value[key], schema[key]) for key in schema)
    if isinstance(schema, list):
        return isinstance(value, list) and len(value) >= len(schema) and all(fits(each, schema[0]) for each in value)
    return value is None if schema is None else type(value) is schema


@pytest.mark.parametrize("verb", SCHEMAS)
def test_json_has_raw_numbers_and_no_more_than_is_promised(config: Path, verb: str) -> None:
    done = nvdimmctl("--config-file", config, *verb.split(), "-f", "json")
    assert done.returncode == (1 if verb == "check" else 0), done.stderr
    assert fits(json.loads(done.stdout), SCHEMAS[verb]), done.stdout


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(config: Path, form: str) -> None:
    for verb in ("list", "pool list", "check"):
        done = nvdimmctl("--config-file", config, *verb.split(), "-f", form)
        assert "main" in done.stdout or "db1" in done.stdout


@pytest.mark.parametrize(
    ("verb", "machine", "human"),
    [
        ("list", "67108864", "64 MiB"),
        ("show db1", "1073741824", "1 GiB"),
        ("pool list", "67108864", "64 MiB"),
        ("pool show main", "1073741824", "1 GiB"),
    ],
)
def test_sizes_for_people(config: Path, verb: str, machine: str, human: str) -> None:
    raw = nvdimmctl("--config-file", config, *verb.split()).stdout
    told = nvdimmctl("--config-file", config, *verb.split(), "-u").stdout
    assert machine in raw
    assert human not in raw
    assert human in told


@pytest.mark.parametrize("key", ["db1", UUID])
def test_a_domain_by_name_and_by_uuid(config: Path, key: str) -> None:
    assert nvdimmctl("--config-file", config, "show", key, "-f", "value", "-c", "name").stdout == "db1\n"


@pytest.mark.parametrize(
    "verb",
    [
        "show db2",
        "show 7",
        "release -y db2",
        "acpi dump db2",
        "pool show other",
        "rewrite /nonexistent.xml",
        "restore /nonexistent.xml",
        "plan /nonexistent.xml",
        "nova inventory --pmem-namespaces X:none",
    ],
)
def test_what_is_not_there(config: Path, verb: str) -> None:
    done = nvdimmctl("--config-file", config, *verb.split())
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("nvdimmctl: ")


@pytest.mark.parametrize("verb", VERBS)
def test_bad_usage(verb: str) -> None:
    done = nvdimmctl(*verb.split(), "--nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: nvdimmctl" in done.stderr


def test_nova_inventory_is_told_in_one_way_what_to_list(config: Path, tmp_path: Path) -> None:
    conf = tmp_path / "nova.conf"
    done = nvdimmctl("--config-file", config, "nova", "inventory", "--pmem-namespaces", "X:a", "--nova-config", conf)
    assert (done.returncode, done.stdout) == (2, "")
    done = nvdimmctl("--config-file", config, "nova", "inventory", "--nova-config", conf)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"Nova's configuration: Failed to find some config files: {conf}" in done.stderr
    conf.touch()
    done = nvdimmctl("--config-file", config, "nova", "inventory", "--nova-config", conf, "-f", "json")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), "none are configured"


def test_no_such_verb() -> None:
    assert nvdimmctl("lsit").returncode == 2


def test_a_no_leaves_all_as_it_is(config: Path) -> None:
    assert nvdimmctl("--config-file", config, "release", "db1").returncode == 1
    assert "db1" in nvdimmctl("--config-file", config, "list").stdout


def test_a_pool_of_that_name_is_there_already(config: Path) -> None:
    done = nvdimmctl("--config-file", config, "pool", "create", "main")
    assert done.returncode == 1, "its section would not be read"
    assert "--config-file" in done.stderr


@pytest.mark.parametrize("verb", ["list", "show db1", "pool list", "pool show main", "check"])
@pytest.mark.parametrize("columns", ["-c nope", "-c Nope -c name -c domain"])
def test_a_column_that_there_is_not_is_named(config: Path, verb: str, columns: str) -> None:
    done = nvdimmctl("--config-file", config, *verb.split(), *columns.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no column nope" in done.stderr.lower()


def test_monitor_says_that_nobody_knows_the_domain(config: Path) -> None:
    for name, said in (
        ("db1", ""),
        (UUID, ""),
        ("typo", "no domain 'typo' with NVDIMMs is known, now or in the events"),
    ):
        done = nvdimmctl("--config-file", config, "monitor", "--no-follow", "--domain", name)
        assert (done.returncode, done.stdout, done.stderr.partition(" (")[0]) == (0, "", said)


def test_check_says_to_people_that_nothing_is_wrong(tmp_path: Path) -> None:
    Ledger(str(tmp_path / "ledger.sqlite")).close()
    file = tmp_path / "empty.conf"
    file.write_text(f"[DEFAULT]\nstate_dir = {tmp_path}\n")
    command = [str(Path(sys.executable).with_name("nvdimmctl")), "--config-file", str(file), "check"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout.strip()) == (0, "")
    assert "nothing is inconsistent" not in done.stderr
    ours, theirs = pty.openpty()
    shown = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    os.close(theirs)
    os.close(ours)
    assert shown.stderr.endswith("nothing is inconsistent\n")

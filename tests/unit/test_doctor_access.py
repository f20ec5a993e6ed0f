# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from nvdimm_driver.doctor.access import check_access
from nvdimm_driver.doctor.finding import Result


def found(tmp_path: Path, text: str) -> list[tuple[str, str]]:
    file = tmp_path / "libvirtd.conf"
    file.write_text(text)
    return [(each.result.value, each.message) for each in check_access(file, "libvirt")]


@pytest.mark.parametrize(
    "text",
    [
        'access_drivers = [ "polkit" ]\n',
        "access_drivers=['polkit']",
        'auth_unix_rw = "none"; access_drivers = ["polkit"]',
        'auth_unix_rw = "none"\naccess_drivers = [\n  # for tenants\n  "polkit",\n]\n',
    ],
)
def test_access_drivers_do_not_hold(tmp_path: Path, text: str) -> None:
    ((result, message),) = found(tmp_path, text)
    assert result == Result.WARN
    assert "access_drivers (polkit)" in message
    assert "members of group libvirt may do all that root may" in message


def test_polkit_is_not_asked(tmp_path: Path) -> None:
    rw, ro = found(tmp_path, 'auth_unix_rw = "polkit"\nauth_unix_ro = "polkit" # default\n')
    assert (rw[0], ro[0]) == (Result.WARN, Result.WARN)
    assert "(auth_unix_rw), and nvdimmd does not: members of group libvirt connect unasked" in rw[1]
    assert "(auth_unix_ro)" in ro[1]


def test_what_holds(tmp_path: Path) -> None:
    for text in ('auth_unix_rw = "none"\n', 'auth_unix_rw="sasl"', "auth_unix_rw='none'\naccess_drivers = []\n"):
        ((result, message),) = found(tmp_path, text)
        assert (result, "promises nothing" in message) == (Result.PASS, True)


@pytest.mark.parametrize("text", ["", '#access_drivers = [ "polkit" ]\n#auth_unix_rw = "polkit"\n'])
def test_the_defaults_are_told(tmp_path: Path, text: str) -> None:
    ((result, message),) = found(tmp_path, text)
    assert (result, "rules of polkit" in message) == (Result.NOTE, True)
    assert next(check_access(tmp_path / "none", "libvirt")).result == Result.NOTE

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from nvdimm_driver.errors import ConfigError
from nvdimm_driver.nova.conf import NovaConf, read

CONF = """
[DEFAULT]
compute_driver = nvdimm_ext.XenLibvirtDriver
my_ip = 10.0.0.1
[libvirt]
virt_type = xen
connection_uri = xen:///system
pmem_namespaces = 6GB:ns0|ns1, 16GB:main/ns2
images_type = nonsense
[filter_scheduler]
enabled_filters = ComputeFilter,NUMATopologyFilter
"""


def test_what_matters_is_read_and_the_rest_is_none_of_ours(tmp_path: Path) -> None:
    first, second = tmp_path / "nova.conf", tmp_path / "nova-compute.conf"
    first.write_text(CONF)
    second.write_text("[libvirt]\nvirt_type = kvm\n")
    assert read([str(first), str(second)]) == NovaConf(
        files=(str(first), str(second)),
        compute_driver="nvdimm_ext.XenLibvirtDriver",
        virt_type="kvm",
        connection_uri="xen:///system",
        pmem_namespaces=("6GB:ns0|ns1", "16GB:main/ns2"),
        enabled_filters=("ComputeFilter", "NUMATopologyFilter"),
    )


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "nova.conf"
    empty.touch()
    assert read([str(empty)]) == NovaConf((str(empty),), "", "", "", (), ())


def test_the_standard_files_are_novas(tmp_path: Path) -> None:
    (tmp_path / "nova").mkdir()
    names = ["nova.conf", "nova-compute.conf"]
    for name in (*names, "nova-api.conf"):
        (tmp_path / "nova" / name).touch()
    assert read(etc=str(tmp_path)).files == tuple(f"{tmp_path}/nova/{name}" for name in names)


@pytest.mark.parametrize("text", [None, "[libvirt\n", "virt_type\n"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "nova.conf"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"Nova's configuration: .*nova\.conf"):
        read([str(file)])

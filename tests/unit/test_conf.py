# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from oslo_config import cfg

from nvdimm_driver import conf, conf_files
from nvdimm_driver.errors import ConfigError
from nvdimm_driver.model import GIB, KIB, SUPERPAGE, Pool


def load(folder: Path, text: str) -> tuple[Pool, ...]:
    file = folder / "nvdimm-driver.conf"
    file.write_text(text)
    return conf.configured_pools(conf.load([str(file)]))


def test_a_pool_has_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "[pool:main]\npaths = /mnt/pmem0\n") == (
        Pool("main", "fsdax", ("/mnt/pmem0",), None, SUPERPAGE, 128 * KIB, False),
    )


def test_all_that_a_pool_can_say(tmp_path: Path) -> None:
    text = """
        [pool:raw]
        kind = pmem
        paths = /dev/pmem1, /dev/pmem2
        quota = 512GiB
        alignsize = 1G
        label_size = 0
        wipe_on_release = true
        [pool:a]
        paths = /mnt/pmem0
    """.replace("        ", "")
    first, second = load(tmp_path, text)
    assert first.name == "a"
    assert second == Pool("raw", "pmem", ("/dev/pmem1", "/dev/pmem2"), 512 * GIB, GIB, 0, True)


def test_a_section_in_which_nothing_is_said_is_no_pool(tmp_path: Path) -> None:
    assert load(tmp_path, "[pool:NAME]\n#paths = /mnt/pmem0\n") == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[DEFAULT]\nstate_dri = /x\n", r"no option state_dri in section \[DEFAULT\] \(did you mean state_dir\?\)"),
        ("[acip]\ndsm = aml\n", r"no section \[acip\] \(did you mean acpi\?\)"),
        ("[pool:a]\nqota = 1GiB\npaths = /a\n", r"no option qota in section \[pool:a\] \(did you mean quota\?\)"),
        ("[pool:A]\npaths = /a\n", r"\[pool:A\]: 'A' is not a name for a pool"),
        ("[pool:a]\nquota = 1GiB\n", r"\[pool:a\] has no paths"),
        ("[pool:a]\npaths = mnt\n", "mnt is not absolute"),
        ("[pool:a]\npaths = /a\nquota = lots\n", "quota.*'lots' is not a size"),
        ("[pool:a]\npaths = /a\nalignsize = 3MiB\n", "alignsize: 3 MiB is not a power of two"),
        ("[pool:a]\npaths = /a\nlabel_size = 4KiB\n", "label_size: a label area has 128 KiB or more"),
        ("[pool:a]\npaths = /a\n[pool:b]\npaths = /a/b\n", "pools a and b both have .*/a"),
        ("[acpi]\ndsm = qemu\nbuilder = native\n", r"\[acpi\] dsm is qemu and \[acpi\] builder is native"),
        ("[acpi]\ndsm = magic\n", "magic"),
        ("[DEFAULT]\nlog_format = xml\n", "xml"),
        (
            "[DEFAULT]\nlog_level = verbose\n",
            r"^configuration: \[DEFAULT\] log_level: .*DEBUG, INFO.*verbose.*correct it in /.*conf\)$",
        ),
        ("[DEFAULT]\nxml_hooks = libxl, libxl\n", "xml_hooks: libxl is in the list twice"),
        ("[xen]\nemulators = /bin/a, qemu\n", r"\[xen\] emulators: qemu is not an absolute path"),
        ("[metrics]\ntextfile = x.prom\n", "x.prom is not an absolute path"),
        ("[metrics]\ninterval = 0\n", "interval"),
        ("[layout]\ngap_gib = -1\n", "gap_gib"),
        ("no section\n", "nvdimm-driver.conf"),
    ],
)
def test_what_is_wrong_is_told_at_once(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, text)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"/nonexistent\.conf"):
        conf.load(["/nonexistent.conf"])


def test_nothing_in_the_environment_chooses_files_or_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sudo keeps HOME, user nova chooses it for a program that rootwrap runs as root."""
    own = tmp_path / "etc/nvdimm-driver"
    for folder in (tmp_path / "home", tmp_path / "home/.nvdimm-driver", tmp_path / "snap/etc/nvdimm-driver", own):
        (folder / "nvdimm-driver.conf.d").mkdir(parents=True)
        for name in ("nvdimm-driver.conf", "pytest.conf", "nvdimm-driver.conf.d/a.conf"):
            (folder / name).write_text("[DEFAULT]\nstate_dir = /chosen\n")
    for variable, value in {"HOME": "home", "SNAP": "snap", "SNAP_COMMON": "snap", "XDG_CONFIG_HOME": "home"}.items():
        monkeypatch.setenv(variable, str(tmp_path / value))
    monkeypatch.setenv("OS_DEFAULT__STATE_DIR", "/chosen")
    monkeypatch.chdir(tmp_path / "home")
    assert conf.load([]).state_dir == "/var/lib/nvdimm-driver"
    assert conf.load().state_dir != "/chosen"
    found = cfg.ConfigOpts()
    conf_files.read(found, "nvdimm-driver", None, etc=str(tmp_path / "etc"))
    assert found.config_file == [str(own / "nvdimm-driver.conf")]
    assert found.config_dir == [str(own / "nvdimm-driver.conf.d")]

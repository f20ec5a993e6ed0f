# SPDX-License-Identifier: Apache-2.0
import runpy

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """A build that writes the module of C declarations: ``cffi_modules=`` would not do so for editable installs."""

    def run(self) -> None:
        ffi = runpy.run_path("nvdimm_driver/xen/abi.py")["ffi"]
        ffi.emit_python_code("nvdimm_driver/xen/_xen.py")
        super().run()


setup(
    name="nvdimm_driver",
    version="0.2.0",
    description="Persistent memory (vNVDIMM) for Xen HVM guests managed by libvirt",
    license="Apache-2.0",
    packages=[*find_packages(include=["nvdimm_driver*"]), "nova.virt.nvdimm_ext"],
    # In Nova's own package: Nova looks for compute drivers nowhere else.
    package_dir={"nova.virt.nvdimm_ext": "shim/nova/virt/nvdimm_ext"},
    python_requires=">=3.11",
    cmdclass={"build_py": BuildPy},
    install_requires=["cffi", "cliff", "lxml", "oslo.config", "prometheus_client", "rich", "stevedore"],
    extras_require={
        "test": [
            "hypothesis",
            "import-linter",
            "libvirt-python",
            "lxml-stubs",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
        ],
        "doc": ["furo", "sphinx"],
        "nova": ["libvirt-python", "nova>=34,<35"],
        "nova-test": [
            "ddt",
            "hypothesis",
            "openstack-placement",
            "oslotest",
            "pytest",
            "requests-mock",
            "SQLAlchemy<2.1",  # with 2.1, Nova's own database fixture fails
            "testscenarios",
            "testtools",
            "wsgi-intercept",
        ],
    },
    entry_points={
        "console_scripts": [
            "nvdimmctl = nvdimm_driver.cmd.nvdimmctl:main",
            "nvdimmd = nvdimm_driver.cmd.nvdimmd:main",
        ],
        "oslo.config.opts": ["nvdimm_driver = nvdimm_driver.conf:list_opts"],
        "nvdimm_driver.drivers": ["xen = nvdimm_driver.driver:XenNvdimmDriver"],
        "nvdimm_driver.xml_hooks": ["libxl = nvdimm_driver.xml.rewrite:LibxlXmlHook"],
        "nvdimm_driver.backings": [
            "fsdax = nvdimm_driver.backing.fsdax:FsdaxBacking",
            "devdax = nvdimm_driver.backing.devdax:DevdaxBacking",
            "pmem = nvdimm_driver.backing.pmem:PmemBacking",
        ],
        "nvdimm_driver.acpi_builders": [
            "qemu = nvdimm_driver.acpi.qemu:QemuAcpiBuilder",
            "native = nvdimm_driver.acpi.native:NativeAcpiBuilder",
        ],
        "nvdimm_driver.mappers": [
            "domctl = nvdimm_driver.xen.domctl:DomctlMapper",
            "dry-run = nvdimm_driver.xen.dry_run:DryRunMapper",
        ],
        "nvdimm_driver.list_formatters": [
            "csv = cliff.formatters.commaseparated:CSVLister",
            "json = cliff.formatters.json_format:JSONFormatter",
            "table = nvdimm_driver.cmd.ctl.table:TableFormatter",
            "value = nvdimm_driver.cmd.ctl.formats:ValueFormatter",
            "yaml = cliff.formatters.yaml_format:YAMLFormatter",
        ],
        "nvdimm_driver.show_formatters": [
            "json = cliff.formatters.json_format:JSONFormatter",
            "shell = nvdimm_driver.cmd.ctl.formats:ShellFormatter",
            "table = nvdimm_driver.cmd.ctl.table:TableFormatter",
            "value = nvdimm_driver.cmd.ctl.formats:ValueFormatter",
            "yaml = cliff.formatters.yaml_format:YAMLFormatter",
        ],
        "nvdimm_driver.doctor_formats": [
            "lines = nvdimm_driver.cmd.ctl.doctor:Lines",
            "csv = cliff.formatters.commaseparated:CSVLister",
            "json = cliff.formatters.json_format:JSONFormatter",
            "table = cliff.formatters.table:TableFormatter",
            "value = cliff.formatters.value:ValueFormatter",
            "yaml = cliff.formatters.yaml_format:YAMLFormatter",
        ],
        "nvdimm_driver.nvdimmctl": [
            "rewrite = nvdimm_driver.cmd.ctl.xml:Rewrite",
            "restore = nvdimm_driver.cmd.ctl.xml:Restore",
            "plan = nvdimm_driver.cmd.ctl.plan:ShowPlan",
            "acpi_dump = nvdimm_driver.cmd.ctl.acpi:AcpiDump",
            "list = nvdimm_driver.cmd.ctl.domains:List",
            "show = nvdimm_driver.cmd.ctl.domains:Show",
            "pool_create = nvdimm_driver.cmd.ctl.pool_create:PoolCreate",
            "pool_list = nvdimm_driver.cmd.ctl.pools:PoolList",
            "pool_show = nvdimm_driver.cmd.ctl.pools:PoolShow",
            "provision = nvdimm_driver.cmd.ctl.backings:Provision",
            "import = nvdimm_driver.cmd.ctl.backings:Import",
            "export = nvdimm_driver.cmd.ctl.backings:Export",
            "send = nvdimm_driver.cmd.ctl.moving:Send",
            "receive = nvdimm_driver.cmd.ctl.moving:Receive",
            "wipe = nvdimm_driver.cmd.ctl.backings:Wipe",
            "release = nvdimm_driver.cmd.ctl.domains:Release",
            "resize = nvdimm_driver.cmd.ctl.resize:Resize",
            "check = nvdimm_driver.cmd.ctl.check:Check",
            "monitor = nvdimm_driver.cmd.ctl.monitor:Monitor",
            "metrics = nvdimm_driver.cmd.ctl.monitor:Metrics",
            "doctor = nvdimm_driver.cmd.ctl.doctor:Doctor",
            "host = nvdimm_driver.cmd.ctl.host:HostFile",
            "register = nvdimm_driver.cmd.ctl.host:Register",
            "unregister = nvdimm_driver.cmd.ctl.host:Unregister",
            "nova_inventory = nvdimm_driver.cmd.ctl.nova:NovaInventory",
        ],
    },
)

# SPDX-License-Identifier: Apache-2.0
# Debian's rules, and a target that makes the hypervisor and nothing else, with Debian's options.
include debian/rules

.PHONY: nvdimm-hypervisor
nvdimm-hypervisor:
	cp debian/xen-kconfig xen/.config
	$(MAKE) -C xen olddefconfig $(make_args_xen) XEN_VENDORVERSION=+nvdimm
	$(MAKE) -C xen build $(make_args_xen) XEN_VENDORVERSION=+nvdimm

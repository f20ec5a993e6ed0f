# SPDX-License-Identifier: Apache-2.0
"""nvdimmd: a proxy between libvirt's clients and libvirtd that rewrites domain XML."""

"""nvdimmd: a proxy between libvirt's clients and libvirtd that rewrites domain XML."""

"""Where an NVDIMM's bytes are kept: files on a DAX file system, device-dax, raw pmem block devices."""

"""Entry points: the programs that libvirt, libxl and the operator run."""

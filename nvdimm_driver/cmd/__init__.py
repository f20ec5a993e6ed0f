"""The programs: what libvirt runs, what libxl runs, and what the operator runs."""

"""The hypervisor: its libraries, xenstore, and what maps host frames into a guest."""

"""OpenStack Nova: its compute driver (compute/), and what the driver's own programs read of Nova's configuration.

Nova need not be installed for conf.py and pmem_namespaces.py.
"""

# SPDX-License-Identifier: Apache-2.0
"""The hypervisor: its libraries, xenstore, and the mappers of host frames into a guest."""

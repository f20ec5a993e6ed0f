# SPDX-License-Identifier: Apache-2.0
"""The checks of ``nvdimmctl doctor``, by theme, and the repairs of ``nvdimmctl check --repair`` (repair.py).

The checks change nothing on the host.
"""

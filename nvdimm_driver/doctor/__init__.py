# SPDX-License-Identifier: Apache-2.0
"""The checks of ``nvdimmctl doctor``, by theme, which change nothing on the host; and ``nvdimmctl check``."""

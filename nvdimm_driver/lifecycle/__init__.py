# SPDX-License-Identifier: Apache-2.0
"""Define, plan, start and release of domains.

define.py provisions and places, plan.py decides without changing anything, start.py freezes and puts away.
"""

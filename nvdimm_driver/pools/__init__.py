# SPDX-License-Identifier: Apache-2.0
"""The operator's pools, in which guests may have persistent memory: rules and quotas, usage, and creation.

rules.py decides which backing a domain may have.
"""

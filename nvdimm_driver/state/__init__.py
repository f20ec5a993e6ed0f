# SPDX-License-Identifier: Apache-2.0
"""The driver's persistent state: the ledger, its events, and the owner marks on the backings themselves.

ownership.py decides which domain owns which backing.
"""

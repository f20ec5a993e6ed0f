"""What is known of domains and backings, and kept: the ledger, its events, and the marks on the backings themselves.

Who owns which backing is decided here, in ownership.py.
"""

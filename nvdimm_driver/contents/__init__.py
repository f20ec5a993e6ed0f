"""The bytes of backings, whether or not a domain has them: provisioned, imported, exported, wiped.

Every copy can be interrupted and repeated; copying.py does it, the others decide what may be copied.
"""
